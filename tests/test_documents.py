"""The documentation names files, commands and keys that exist."""

import importlib
import json
import os
import re
import subprocess
import sys
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


@pytest.mark.slow
def test_the_reference_lists_every_public_name(tmp_path):
    pytest.importorskip("mkdocs")
    import sparsereg

    site = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(site, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    pages = "".join(page.read_text() for page in (tmp_path / "api").rglob("index.html"))
    anchors = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="(sparsereg\.[^"]+)"', pages)}
    names = set(sparsereg.__all__)
    for module in ("gates", "layers", "penalties", "compression", "calibration"):
        names |= set(importlib.import_module(f"sparsereg.{module}").__all__)
    assert names <= anchors, names - anchors


def test_docstrings_name_things_plainly():
    roles = re.compile(r":(?:class|func|meth|mod|attr|data|obj|exc|const):`")  # of another documentation tool
    files = [path for path in ROOT.glob("sparsereg/**/*.py") if roles.search(path.read_text())]
    assert not files


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/two-frames.md",
        "docs/own-network.md",
        "docs/any-network.md",
        "docs/from-torch-pruning.md",
    ],
)
def test_the_code_of_a_guide_runs(page, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"->|CalibrationResult|0\.\d", done.stdout)


@pytest.mark.parametrize("notebook", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_run_from_top_to_bottom(notebook, tmp_path):
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(cell.get("outputs") for cell in cells)
