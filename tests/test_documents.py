"""The documentation names files, commands and keys that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_figures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_command_of_the_readme_composes():
    from hydra import compose, initialize_config_dir

    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^\s*python (train|test|calibrate)\.py ([^#\n]*)", text, flags=re.M)
    assert len(commands) > 8
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for name, rest in commands:
            overrides = [o for o in rest.split() if not o.startswith("-") and "," not in o]
            compose(name, overrides=overrides)


def test_version_has_one_home():
    import sparsereg

    assert re.fullmatch(r"\d+\.\d+\.\d+", sparsereg.__version__)
    assert "version = {" in (ROOT / "pyproject.toml").read_text()
