"""What a type checker says of a user's script."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

from tests.test_package import PUBLIC

SCRIPT = pathlib.Path(__file__).parent / "typing_script.py"
ROOT = SCRIPT.parent.parent


def test_the_script_uses_every_public_name():
    tree = ast.parse(SCRIPT.read_text("utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    returned = {"Advice", "Finding"}  # nobody makes these, and the script reads what they hold
    assert {name.rpartition(".")[2] for name in PUBLIC} - returned <= used


@pytest.mark.slow
def test_strict_checking_finds_what_is_wrong_and_nothing_else(tmp_path):
    pytest.importorskip("pyright")
    script = SCRIPT.read_text("utf-8")
    (tmp_path / "script.py").write_text(script, "utf-8")
    (tmp_path / "wrong.py").write_text(script.replace("atol=1e-6", "atol='little'"), "utf-8")
    settings = {
        "typeCheckingMode": "strict",
        "reportMissingTypeStubs": False,  # Keras has none
        "extraPaths": [str(ROOT)],
        "include": ["script.py", "wrong.py"],
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), "utf-8")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert len(found) == 1, "\n".join(f"{each['file']}: {each['range']['start']}: {each['message']}" for each in found)
    assert found[0]["file"].endswith("wrong.py")
    assert found[0]["rule"] == "reportArgumentType"
