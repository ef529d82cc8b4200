"""Habits of the house that no linter knows."""

import ast
import doctest
import importlib
import inspect
import tempfile
from pathlib import Path

import pytest

import sparsereg
import sparsereg.calibration
import sparsereg.compression

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


OFFERS = {name: getattr(sparsereg, name) for name in sparsereg.__all__}
OFFERS |= {
    f"{room.__name__}.{name}": getattr(room, name)
    for room in (sparsereg.calibration, sparsereg.compression)
    for name in room.__all__
}


def examples(offer: object) -> list[doctest.DocTest]:
    """The examples in the docstring of a public name itself."""
    home = importlib.import_module(offer.__module__)
    found = doctest.DocTestParser().get_doctest(
        inspect.getdoc(offer) or "", dict(vars(home)), offer.__name__, home.__file__, 0
    )
    return [found] if found.examples else []


@pytest.mark.parametrize("name", OFFERS)
def test_every_public_name_has_an_example(name):
    assert examples(OFFERS[name]), f"the docstring of {name} has no example"


@pytest.mark.parametrize("name", OFFERS)
def test_examples_are_true(name, tmp_path, monkeypatch):
    if name.endswith("quantize"):
        pytest.importorskip("onnxscript")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for example in examples(OFFERS[name]):
        said: list[str] = []
        result = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
        assert not result.failed, "".join(said)
