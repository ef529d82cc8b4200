"""A part of ``benchmarks.coverage``: networks of three libraries, each halved and compared; its processes."""

import pytest

from benchmarks import coverage
from benchmarks.coverage_cases import Case, cases
from benchmarks.coverage_checks import LIMIT, examined
from benchmarks.coverage_page import write_page

NETWORKS = {
    "torchvision": "mobilenet_v3_small lraspp_mobilenet_v3_large",
    "timm": "test_vit test_convnext test_efficientnet test_resnet",
    "huggingface": "bert llama gemma t5 wav2vec2 swinv2",
}
"""Small ones of kinds that have little in common."""


@pytest.mark.costly
@pytest.mark.parametrize("name", [f"{library} {n}" for library, ns in NETWORKS.items() for n in ns.split()])
def test_half_of_a_network_equals_the_masked_one(name):
    library, name = name.split()
    pytest.importorskip({"huggingface": "transformers"}.get(library, library))
    found = examined(named(library, name))
    assert found["why"] == ""
    assert float(found["difference"]) <= LIMIT
    assert float(found["share"]) > 0.85


def named(library, name):
    """A network of the list, or one of timm's that are made for tests."""
    listed = cases(library, [name])
    if listed:
        return listed[0]
    like = cases("timm")[0]
    return Case("timm", name, "", like.make)


def small(name):
    import torch
    from torch import nn

    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.randn(2, 3),), {}


def test_a_table_is_gone_on_with_and_makes_a_page(tmp_path):
    case = Case("timm", "small", "smalls", small)
    table = coverage.Table(tmp_path / "coverage.csv")
    table.add(case, examined(case))
    again = coverage.Table(tmp_path / "coverage.csv")
    assert again.has(case, "examined")
    assert not again.has(case, "halved_by_torch_pruning")
    write_page(tmp_path / "coverage.md", again.rows)
    text = (tmp_path / "coverage.md").read_text()
    assert "| timm | 1 | 1 | 1 | 1 | 0 | 0 | 0 |" in text
    assert "| small | 2x3 | 38 | " in text
    again.forget(["small"])
    assert not again.has(case, "examined")


def endless(case):
    while True:
        pass


def dies(case):
    import os

    os._exit(7)


@pytest.mark.costly
def test_a_process_that_takes_too_long_or_dies_is_one_line():
    case = Case("timm", "small", "smalls", small)
    jobs = [(case, endless), (case, dies)]
    found = [why["torch_pruning_why"] for _, why in coverage.run_all(jobs, 2, 5.0, 64.0)]
    assert sorted(found) == ["it took more than 5 s", "the process ended with code 7"]
