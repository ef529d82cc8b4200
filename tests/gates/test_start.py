"""The four scales of a gate's start: the table in docs/sparsity.md."""

import re
from pathlib import Path

import pytest

from sparsereg.calibration import SparseCalibrationWeights
from sparsereg.distributions import HardConcrete, gate_median, p_active
from sparsereg.gates import L0Gate as Selector
from sparsereg.layers import L0Conv2d, L0Linear, SparseMLP
from sparsereg.model.basic_l0_blocks import L0Gate
from sparsereg.sparse import SparseL0Linear

ROOT = Path(__file__).parents[2]
BETA = 2 / 3
STARTS = {
    "droprate_init": (lambda v: L0Gate(3, droprate_init=v, temperature=BETA, jitter=0.0),),
    "init_keep_prob": (
        lambda v: SparseL0Linear(3, init_keep_prob=v, seed=0),
        lambda v: SparseCalibrationWeights(3, init_keep_prob=v, log_alpha_jitter_sd=0.0),
    ),
    "init_mean": (
        lambda v: HardConcrete(3, init_mean=v, temperature=BETA),
        lambda v: Selector(3, init_mean=v, temperature=BETA),
        lambda v: SparseL0Linear(3, init_mean=v, seed=0),
    ),
    "init_sparsity": (
        lambda v: L0Linear(3, 2, init_sparsity=v, temperature=BETA),
        lambda v: L0Conv2d(3, 2, 3, init_sparsity=v, temperature=BETA),
        lambda v: SparseMLP(3, 2, 2, init_sparsity=v, temperature=BETA),
    ),
}


def table() -> dict[str, list[str]]:
    section = (ROOT / "docs" / "sparsity.md").read_text().partition("## Where a gate starts")[2]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section.partition("\n## ")[0], flags=re.M)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


def test_the_table_names_every_scale():
    assert set(table()) == set(STARTS)


@pytest.mark.parametrize("name", STARTS)
def test_the_table_is_true(name):
    probability, gate = table()[name][-2:]
    for make in STARTS[name]:
        module = make(0.5)
        log_alpha = next(p for n, p in module.named_parameters() if n.endswith("log_alpha"))
        assert p_active(log_alpha, BETA).mean().item() == pytest.approx(float(probability), abs=0.01)
        median = gate_median(log_alpha, BETA).mean().item()
        assert median == pytest.approx({"1/2": 0.5, "0": 0.0}[gate], abs=0.02)


def test_no_docstring_takes_one_scale_for_another():
    for path in (ROOT / "sparsereg").rglob("*.py"):
        said = " ".join(path.read_text().split())
        assert not re.search(r"(droprate_init|init_keep_prob): [Ii]nitial P\(z [=>] 0\)", said), path
