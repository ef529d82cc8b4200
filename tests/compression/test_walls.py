"""Who imports whom around sparsereg.compression: nothing below it knows it, and it knows nothing above."""

import ast
from pathlib import Path

import pytest

import sparsereg

ROOT = Path(sparsereg.__file__).parent
BELOW = (
    "archives", "checks", "target_settings", "data", "device", "distributions", "errors", "files", "layers",
    "model", "penalties", "progress", "summary",
)  # fmt: skip
UPWARD = {"penalties"}
"""Whose get_active_parameter_count compacts a network if it is given an example: only then, inside of it."""


def imports(file):
    """Modules of sparsereg that a file imports, with whether that is at its top."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsereg."):
            yield node.module.split(".")[1], node in tree.body


def files_of(name):
    return [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else sorted((ROOT / name).rglob("*.py"))


def test_compression_imports_only_what_is_below():
    for file in files_of("compression"):
        for name, _ in imports(file):
            assert name in (*BELOW, "compression"), f"{file.name} imports {name}"


@pytest.mark.parametrize("name", [*BELOW, "gates", "linalg", "sparse", "temperature"])
def test_nothing_below_imports_compression(name):
    files = files_of(name)
    assert files
    for file in files:
        for other, at_top in imports(file):
            allowed = other != "compression" or (name in UPWARD and not at_top)
            assert allowed, f"{file.name} imports compression"
