"""The comparison with other ways to prune, at toy size: every method, the table, and going on."""

import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

from .conftest import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import against
from sparsereg.model.transformer import Shape
from sparsereg.model.vit import ViT


@pytest.fixture
def task():
    """Squares of two kinds, and a ViT of 5,000 parameters."""

    def drawn(generator):
        y = torch.from_numpy(generator.integers(0, 2, 16))
        noise = torch.from_numpy(generator.normal(size=(16, 1, 8, 8))).float()
        return noise + y.view(-1, 1, 1, 1), y

    held_out = [drawn(np.random.default_rng(n)) for n in (7, 8)]
    shape = Shape(width=16, depth=2, heads=2)
    rates = dict.fromkeys((0.5, 0.7), 1e-3)
    return against.Task(
        lambda: ViT(2, (1, 8, 8), 4, shape), drawn, held_out, held_out, "accuracy", 20, 40, rates
    )


@pytest.mark.costly
@pytest.mark.parametrize("method", against.METHODS)
def test_each_method_makes_a_smaller_network_that_answers(task, method, tmp_path):
    row = against.run("toy", task, method, 0.5, 0, tmp_path)
    assert 0.5 <= float(row["validation"]) <= 1
    # CoFi's way decides without counting; by magnitude whole branches go, and nothing fills the rest.
    allowed = {"cofi": (0.0, 0.95), "magnitude": (0.5, 0.75)}.get(method, (0.5, 0.56))
    assert allowed[0] <= float(row["reached"]) <= allowed[1]
    assert (tmp_path / "toy-0.pt").is_file()


@pytest.mark.costly
def test_runs_that_are_in_the_table_are_not_repeated(task, tmp_path, monkeypatch):
    monkeypatch.setitem(against.NETWORKS, "gpt", lambda mnist: task)
    given = Namespace(
        networks=["gpt"], methods=["taylor"], sparsities=[0.5, 0.7], seeds=[0], mnist=None,
        out=tmp_path / "against.csv", dense=tmp_path, runs=1,
    )  # fmt: skip
    against.run_all(given)
    first = against.read(given.out)
    assert [row["target"] for row in first] == ["0.5"]
    against.run_all(given)
    again = against.read(given.out)
    assert again[0] == first[0]
    assert [row["target"] for row in again] == ["0.5", "0.7"]
    assert "| 0.7 | " in against.table(again)


def test_ranks_decide_how_many_of_each_tensor_stay():
    gates = [against.HardConcrete(4), against.HardConcrete(1), against.HardConcrete(1)]
    with torch.no_grad():
        gates[0].log_alpha.copy_(torch.tensor([3.0, -6.0, 4.0, -7.0]))
        gates[1].log_alpha.fill_(5.0)
        gates[2].log_alpha.fill_(-5.0)
    against.decide_(gates, 0.8)
    opened = [(gate.median() > 0).tolist() for gate in gates]
    assert opened == [[True, False, True, False], [True], [False]]
    network = nn.ModuleList(gates)
    assert all(0 <= float(z) < 1 for gate in network for z in gate.median().detach())
