"""The floors of docs/architecture.md hold: no file imports what stands above it, and no two need each other.

Imports inside functions and for types count too. The arrows that run up on purpose are those that the page
explains.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import sparsereg

ROOT = Path(sparsereg.__file__).parent
PAGE = (ROOT.parent / "docs" / "architecture.md").read_text()
TABLE = next(block for block in PAGE.split("\n\n") if block.startswith("| floor"))
FLOORS = [re.findall(r"`([^`]+)`", row) for row in TABLE.splitlines()[2:]]
"""Names in the rows of the page's first table, from the door down to the ground."""
UPWARD = {("sparsereg.penalties", "sparsereg.compression.compact")}
"""Explained under "Arrows that run back up"."""
TYPES_ONLY = re.compile(r"sparsereg\.compression\.units\.(flow|fold|steps\..*)")
"""Steps are handed the network that they are steps of: an arrow for types only, in one room."""


def module(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {module(path): path for path in ROOT.rglob("*.py")}


def imported(path: Path, types: bool = True) -> Iterator[str]:
    """Modules of ours that a file imports: everywhere in it, or not where it is for types only."""
    tree = ast.parse(path.read_text())
    if not types:
        tree.body = [
            n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor(name: str) -> int | None:
    """The row of the table in which a module, or the nearest folder that it is in, stands."""
    parts = name.split(".")[1:]
    while parts:
        known = ("/".join(parts) + "/", "/".join(parts) + ".py")
        found = [i for i, names in enumerate(FLOORS) if set(known) & set(names)]
        if found:
            return found[0]
        parts.pop()
    return None


def arrows(types: bool = True) -> dict[str, set[str]]:
    return {name: {i for i in imported(path, types) if i in FILES} - {name} for name, path in FILES.items()}


def test_every_file_stands_on_a_floor():
    assert len(FLOORS) == 7
    lost = {name for name in FILES if floor(name) is None}
    assert lost <= {"sparsereg", "sparsereg.__main__"}, lost


def test_no_arrow_runs_up_that_is_not_explained():
    up = set()
    for name, below in arrows().items():
        for other in below - {"sparsereg"}:
            if name not in ("sparsereg", "sparsereg.__main__") and floor(other) < floor(name):
                up.add((name, other))
    assert up == UPWARD
    for name, _ in UPWARD:
        assert f"`{name.removeprefix('sparsereg.')}." in PAGE.partition("## Arrows that run back up")[2]


def test_no_two_files_need_each_other():
    below = arrows()
    for name in list(below):
        below[name] -= {"sparsereg"} | {other for a, other in UPWARD if a == name}
        if TYPES_ONLY.fullmatch(name):
            below[name] = {i for i in imported(FILES[name], types=False) if i in FILES} - {name}
    while below:
        free = [name for name, needed in below.items() if not needed & below.keys()]
        assert free, f"a circle among {sorted(below)}"
        below = {name: needed for name, needed in below.items() if name not in free}
