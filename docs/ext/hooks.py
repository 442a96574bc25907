"""What mkdocs does besides: pictures of the benchmarks, and links from names in the text to the API."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
API = {
    name.rpartition(".")[2]: name
    for page in (ROOT / "docs" / "api").glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pictures and figures of the benchmarks, as `results/...`."""
    for path in sorted(RESULTS.glob("*/*")):
        name = path.relative_to(RESULTS).as_posix()
        files.append(File.generated(config, f"results/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links the first mention of each public name in a section: `` `Equal` `` to its entry in the API."""
    parts = re.split(r"(^```.*?^```$|^#+ [^\n]*$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith(("```", "#")) else _linked(part) for part in parts)


def _linked(text: str) -> str:
    seen = set()

    def link(found: re.Match[str]) -> str:
        name = found[1]
        if name not in API or name in seen:
            return found[0]
        seen.add(name)
        return f"[`{name}`][{API[name]}]"

    return re.sub(r"(?<!\[)`(\w+)`(?![\]`])", link, text)
