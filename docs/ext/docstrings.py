"""How docstrings become pages: examples are Python, and public names in the text are links."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:\n(?P<lines>(?:.+\n?)+)", re.MULTILINE)
NAME = re.compile(
    r"(?<!\[)`(?P<shown>(?:equalize\.)?(?P<name>GroupRegistry(?:\.\w+)?)|"
    r"equalize\.(?:\w+\.\w+|[A-Z]\w+|share|relation))`"
)


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of all objects as they are read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = EXAMPLE.sub(_fenced, obj.docstring.value)
            obj.docstring.value = NAME.sub(_linked, text)


def _fenced(found: re.Match[str]) -> str:
    return f"**Example**\n\n```pycon\n{found['lines'].rstrip()}\n```\n"


def _linked(found: re.Match[str]) -> str:
    target = f"equalize.{found['name']}" if found["name"] else found["shown"]
    return f"[`{found['shown']}`][{target}]"
