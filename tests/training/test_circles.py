"""No two files of training need each other."""

import ast
from pathlib import Path

import sparsereg.training

FOLDER = Path(sparsereg.training.__file__).parent


def imports(file: Path) -> set[str]:
    """Modules of this folder that a file imports, for types included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsereg.training"):
            rest = (node.module or "").removeprefix("sparsereg.training").lstrip(".")
            found |= {rest} if rest else {alias.name for alias in node.names}
    return found


def test_no_circle():
    arrows = {file.stem: imports(file) for file in FOLDER.glob("*.py")}
    while arrows:
        free = [name for name, below in arrows.items() if not below & arrows.keys()]
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: below for name, below in arrows.items() if name not in free}
