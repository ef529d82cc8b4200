"""Programs as users of l0-python have them, with ``l0`` replaced by ``sparsereg``; and those of the guide.

The files of examples/ are such programs, page by page: the blocks of a page run one after another in one
namespace, as a reader pastes them. What they leave open (data, loaders, a file) is supplied here.
"""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).parent
GUIDE = HERE.parents[1] / "docs" / "migrating.md"


def batches(*shape: int, classes: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=generator)
    return [(a, torch.randint(0, classes, (shape[0],), generator=generator)) for a in x]


def supply() -> dict[str, dict[str, object]]:
    """Names that an example expects to exist already."""
    from sparsereg.layers import SparseMLP

    flat = batches(8, 784)
    images = batches(2, 3, 38, 38)  # 38 pixels leave 3 x 3 maps behind the three convolutions
    rows = torch.randn(10_000, 8)
    wide = torch.randn(10_000, 1000)
    mlp = {"model": SparseMLP(20, 8, 4)}
    return {
        "guide_02_classifier": {"train_loader": flat},
        "guide_07_temperature": {"train_loader": flat, "SparseMLP": SparseMLP},
        "guide_08_l0l2": {"train_loader": batches(8, 100)},
        "guide_11_gpu": {"train_loader": flat},
        "guide_13_accumulate": {"train_loader": images * 3},
        "notes_1_samples": {"data": rows},
        "notes_2_microcalibrate": {"household_weights": np.ones(50)},
        "notes_3_survey": {"households": list(range(50)), "weights": torch.ones(50)},
        "notes_4_temperature": mlp,
        "notes_5_l0l2": {**mlp, "task_loss": torch.zeros(())},
        "notes_6_hybrid": {"data": rows},
        "notes_7_features": {"data": wide},
        "api_1_hard_concrete": {"torch": torch},
        "api_4_mlp": {"dataloader": flat},
        "api_8_prune": {"model": SparseMLP(20, 8, 4)},
        "api_9_complete": {"train_loader": flat[:1]},
        "readme_1_calibration": {},
        "readme_2_network": {
            "input_data": flat[0][0],
            "target": flat[0][1],
            "criterion": nn.CrossEntropyLoss(),
        },
        "readme_3_selectors": {"data": wide},
    }


SHORTER = {
    "readme_1_calibration": [("epochs=2000", "epochs=20"), ("verbose_freq=100", "verbose_freq=10")],
    "readme_2_network": [("range(100)", "range(10)")],
    "api_9_complete": [("range(100)", "range(5)")],
}
"""Loops that would take long; nothing else is changed."""

BROKEN = {"guide_07_temperature": "SparseMLP", "api_9_complete": "get_active_parameter_count"}
"""Examples that use a name that no block of their page imports; docs/migrating.md has the right lines."""


def program(name: str) -> str:
    text = (HERE / "examples" / f"{name}.py").read_text()
    for old, new in SHORTER.get(name, []):
        assert old in text
        text = text.replace(old, new)
    return text


def run(text: str, name: str, namespace: dict[str, object]) -> None:
    exec(compile(text, name, "exec"), namespace)


def pages() -> dict[str, list[str]]:
    names = sorted(path.stem for path in (HERE / "examples").glob("*.py"))
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.split("_")[0], []).append(name)
    return found


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder to work in with the data file that an example reads, and a stub of the other package."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.standard_normal((60, 30)), columns=[f"x{i}" for i in range(30)])
    frame["y"] = rng.integers(0, 2, 60)
    frame.to_csv("data.csv", index=False)
    other = types.ModuleType("microcalibrate")
    other.Calibration = object
    monkeypatch.setitem(sys.modules, "microcalibrate", other)
    return tmp_path


@pytest.mark.parametrize("page", ["guide", "notes", "api"])
def test_examples_of_a_page_run_one_after_another(page, desk):
    supplied = supply()
    namespace: dict[str, object] = {}
    for name in pages()[page]:
        namespace.update(supplied.get(name, {}))
        if name == "api_9_complete":
            from sparsereg.penalties import get_active_parameter_count

            namespace["get_active_parameter_count"] = get_active_parameter_count
        run(program(name), name, namespace)
    if page == "guide":
        check_guide(namespace, desk)


def check_guide(namespace: dict[str, object], desk: Path) -> None:
    """What the examples of the guide should have found."""
    assert (desk / "pruned_model.pt").exists()
    images = batches(2, 3, 38, 38)[0][0]
    torch.testing.assert_close(namespace["inference_model"](images), namespace["pruned_model"](images))
    # In training mode the share of the gates is a draw, with expectation 12,500 and deviation 108.
    assert abs(len(namespace["indices"]) - 50_000) < 700
    assert len(namespace["top_features"]) == 10


@pytest.mark.parametrize("name", [n for n in pages()["readme"] if n != "readme_1_calibration"])
def test_examples_of_the_package_page(name, desk):
    run(program(name), name, dict(supply()[name]))


@pytest.mark.filterwarnings("ignore:device 'cuda' was asked for:UserWarning")
def test_calibration_example_of_the_package_page(desk):
    namespace: dict[str, object] = {}
    run(program("readme_1_calibration"), "readme_1_calibration", namespace)
    assert namespace["y_pred"].shape == (200,)
    assert 0 < namespace["active"]["count"] <= 10_000


@pytest.mark.parametrize("name", BROKEN)
def test_what_the_guide_calls_broken_is_broken(name, desk):
    supplied = supply()
    namespace = dict(supplied[name])
    namespace.pop(BROKEN[name], None)
    if name.startswith("guide"):
        namespace.update(torch=torch)
    with pytest.raises(NameError, match=BROKEN[name]):
        run(program(name), name, namespace)
    assert BROKEN[name] in GUIDE.read_text()


def test_the_lines_of_the_migration_guide_run(desk):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict[str, object] = {"train_loader": batches(4, 3, 38, 38), "F": F, "torch": torch, "nn": nn}
    run(program("guide_03_sparse_cnn"), "guide_03_sparse_cnn", namespace)
    for i, block in enumerate(blocks):
        run(block, f"migrating.md block {i}", namespace)


def test_nothing_is_left_of_the_old_name():
    for path in (HERE / "examples").glob("*.py"):
        assert not re.search(r"\b(from|import) l0\b", path.read_text()), path
    assert sum(len(names) for names in pages().values()) == 32
