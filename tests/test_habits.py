"""Habits of the house that no linter knows."""

import ast
from pathlib import Path

import sparsereg

PACKAGE = Path(sparsereg.__file__).parent
DOOR = ("commands", "cli.py", "sweep.py", "calibration/command", "__main__.py")
"""Where a user of the command stands; a library logs."""


def test_the_library_prints_nothing():
    for file in PACKAGE.rglob("*.py"):
        inside = file.relative_to(PACKAGE).as_posix()
        if not inside.startswith(DOOR):
            calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
            prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
            assert not prints, f"{inside}: print in lines {prints}"
