"""app.py keeps to its map and to limits of size, and its prose to plain words."""

import ast
import doctest
import re
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import app as bitbreeze

SOURCE = Path(bitbreeze.__file__)
TESTS = Path(__file__).parent
TEXT = SOURCE.read_text()
LINES = TEXT.splitlines()
TREE = ast.parse(TEXT)
BANNER = re.compile(r"^# -- ([\w ]+) -+$", re.M)
FUNCTIONS = {
    f"{node.name}, line {node.lineno}": node.end_lineno - node.lineno + 1
    for node in ast.walk(TREE)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
}


def test_banners_match_the_map():
    sections = re.findall(r"^    ([A-Z][\w ]+?)  +\S", bitbreeze.__doc__, re.M)
    assert BANNER.findall(TEXT) == sections


# -- Size -----------------------------------------------------------------------------


def test_app_is_short():
    assert len(LINES) <= 4680


def test_functions_are_short():
    assert {name: size for name, size in FUNCTIONS.items() if size > 60} == {}
    assert statistics.median(FUNCTIONS.values()) <= 12


def test_lines_are_at_most_88_columns():
    assert [number for number, line in enumerate(LINES, 1) if len(line) > 88] == []


def test_enough_lines_explain():
    explaining = comment_lines() | docstring_lines()
    assert len(explaining) >= 0.12 * len(LINES)


def comment_lines():
    """Return the numbers of the lines of app.py that are comments."""
    with tokenize.open(SOURCE) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    return {
        token.start[0]
        for token in tokens
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
    }


def docstring_lines():
    """Return the numbers of the lines of app.py that are part of a docstring."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    bodies = [node.body for node in ast.walk(TREE) if isinstance(node, documented)]
    strings = [
        body[0] for body in bodies
        if body and isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ]  # fmt: skip
    return {
        number
        for string in strings
        for number in range(string.lineno, string.end_lineno + 1)
    }


# -- Sections -------------------------------------------------------------------------


def test_private_names_stay_in_their_section():
    starts = [TEXT.count("\n", 0, banner.start()) for banner in BANNER.finditer(TEXT)]

    def section(line):
        return sum(start < line for start in starts)

    homes = {
        name: section(node.lineno) for node in TREE.body for name in names_made_by(node)
    }
    strays = [
        f"{node.id}, line {node.lineno}"
        for node in ast.walk(TREE)
        if isinstance(node, ast.Name)
        and re.match("_[A-Za-z]", node.id)
        and homes.get(node.id, section(node.lineno)) != section(node.lineno)
    ]
    assert strays == []


def names_made_by(node):
    """Return the names that a statement defines at the top level of the module."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    return [
        name.id
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    ]


def test_late_imports_stand_in_one_place():
    late = [number for number, line in enumerate(LINES, 1) if "# noqa: E402" in line]
    between = [node for node in TREE.body if late[0] <= node.lineno <= late[-1]]
    assert [
        f"line {node.lineno} is no import" for node in between
        if not isinstance(node, ast.Import | ast.ImportFrom)
    ] == []  # fmt: skip


# -- Prose ----------------------------------------------------------------------------

# Words that make a sentence hard to read or to translate: name the peer, the client or
# the operator instead. Some have a plain use, too, so each file has a budget. Lower it
# whenever a file has fewer.
RIDDLES = re.compile(
    r"\b(who(m?)ever|nobody|himself|one another|what is|of its own|anew|has to go"
    r"|is but|had better|those who|one that|be it)\b",
    re.I,
)
BUDGET = {"app.py": 0, "README.md": 6, "tests": 37}


@pytest.mark.parametrize("name", BUDGET)
def test_prose_has_no_riddles(name):
    path = SOURCE.parent / name
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    riddles = [
        f"{file.name}: {' '.join(riddle[0].split())}"
        for file in files
        if file != Path(__file__)
        for riddle in RIDDLES.finditer(unwrapped(file))
    ]
    assert len(riddles) <= BUDGET[name], riddles


def unwrapped(file):
    """Return the text of a file in one line, without the marks of comments."""
    return re.sub(r"\s*\n\s*(# )?", " ", file.read_text())


# -- Tools ----------------------------------------------------------------------------


def test_examples_in_docstrings_are_right():
    assert doctest.testmod(bitbreeze).failed == 0


def test_linter_is_content():
    ruff = [sys.executable, "-m", "ruff"]
    files = [str(SOURCE), str(TESTS)]
    config = ["--no-cache", "--config", str(TESTS / "ruff.toml")]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [*ruff, *command, *config, *files], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


# Checks that say little about code without type annotations: named tuples that are made
# with *, attributes that are None for a while, and attributes of Flask's current_app.
UNUSED_CHECKS = (
    *("arg-type", "assignment", "attr-defined", "call-arg", "method-assign"),
    *("misc", "union-attr", "var-annotated"),
)


def test_type_checker_is_content(tmp_path):
    options = [f"--disable-error-code={code}" for code in UNUSED_CHECKS]
    options += ["--check-untyped-defs", "--ignore-missing-imports"]
    mypy = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path, *options, SOURCE]
    done = subprocess.run(mypy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
