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


# What says little of code without types: named tuples that are made by *, attributes
# that are None for a while, and those of Flask's current_app.
NOT_ASKED = (
    *("arg-type", "assignment", "attr-defined", "call-arg", "method-assign"),
    *("misc", "union-attr", "var-annotated"),
)


def test_type_checker_is_content(tmp_path):
    options = [f"--disable-error-code={code}" for code in NOT_ASKED]
    options += ["--check-untyped-defs", "--ignore-missing-imports"]
    mypy = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path, *options, SOURCE]
    done = subprocess.run(mypy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
