"""Results show themselves in five lines, and as a table in notebooks."""

import numpy as np
import pytest
import torch

import sparsereg
from sparsereg.calibration import CalibrationProblem, calibrate
from sparsereg.compression import count
from sparsereg.model.lenet import LeNet300


def _problem():
    rng = np.random.default_rng(0)
    return CalibrationProblem(
        rng.random((5, 60)), rng.random(5) * 100 + 50, target_groups=list("aabb<"), target_names=list("vwxyz")
    )


def _zeros():
    return CalibrationProblem(np.array([[1.0, -1.0]]), [0.0])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_problem, ["5, groups: 3", "60", "300 (100.00%)", "sum 60"]),
        (lambda: calibrate(_problem(), num_households=10), ["10 of 60 households", "mean ", "effective "]),
        (lambda: calibrate(_zeros(), method="calibrate"), ["2 of 2 households", "none: all targets are 0"]),
        (lambda: count(LeNet300(), torch.zeros(1, 1, 28, 28)), ["parameters", "exact sparsity", "gates"]),
        (
            lambda: sparsereg.explain(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)),
                                      torch.zeros(1, 3)),
            ["4 units", "no operation"],
        ),
    ],
)  # fmt: skip
def test_five_lines_and_a_table(make, says):
    shown = make()
    text = repr(shown)
    assert len(text.splitlines()) == 5
    assert max(map(len, text.splitlines())) < 100
    table = shown._repr_html_()
    assert table.startswith("<table>")
    for part in says:
        assert part in text
        assert part in table


def test_gates_say_how_many_and_how_warm():
    assert "temperature" in repr(sparsereg.HardConcrete(5))


def test_names_of_the_field_stand_beside_those_before():
    result = calibrate(_problem(), num_households=10)
    told = result.diagnostics
    assert told["weighting_effect"] == told["design_effect"] == told["kept"] / told["ess"]
    assert result.kkt_violation == result.optimality
