"""The house: its map is true, it stays readable, and the linter has nothing to say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import app as bitbreeze

SOURCE = Path(bitbreeze.__file__)
TESTS = Path(__file__).parent


def test_banners_are_those_of_the_map():
    text = SOURCE.read_text()
    rooms = re.findall(r"^    ([A-Z]\w+)  +\S", bitbreeze.__doc__, re.M)
    assert re.findall(r"^# -- (\w+) -+$", text, re.M) == rooms


def test_functions_are_short():
    tree = ast.parse(SOURCE.read_text())
    sizes = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: size for name, size in sizes.items() if size > 40} == {}


def test_linter_is_content():
    ruff = [sys.executable, "-m", "ruff"]
    files = [str(SOURCE), str(TESTS)]
    config = ["--no-cache", "--config", str(TESTS / "ruff.toml")]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [*ruff, *command, *config, *files], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
