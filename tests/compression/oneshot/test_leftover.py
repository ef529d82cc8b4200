"""What is left over of layers while their inputs go, wherever the inputs of a unit stand."""

import torch

from sparsereg.compression.oneshot.least_squares import Sums
from sparsereg.compression.oneshot.leftover import RIDGE, _Fit, _Table

INPUTS = 8


def table(order):
    """Two layers of ``INPUTS`` inputs in an order, of which pairs go together."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(INPUTS, INPUTS, generator=draw).double()
    x = torch.randn(50, INPUTS, generator=draw).double() @ mixed
    weights = [torch.randn(INPUTS, 3, generator=draw).double() for _ in range(2)]
    senses = [torch.rand(3, generator=draw).double() for _ in range(2)]
    x = torch.cat([x[:, order], torch.ones(50, 1)], 1).double()[None]
    sums = Sums.none(1, INPUTS + 1, 0, x.device)
    sums.add_(x, x[:, :, :0])
    at = {unit: place for place, unit in enumerate(order)}
    columns = {g: [at[2 * g], at[2 * g + 1]] for g in range(INPUTS // 2)}
    return _Table(sums, [w[order] for w in weights], senses, columns), x[0, :, :-1], at


def test_inputs_in_a_row_and_inputs_apart_go_alike():
    one, apart = [_Fit(table(order)[0], 0) for order in (list(range(8)), [3, 0, 5, 2, 7, 4, 1, 6])]
    assert all(isinstance(span, slice) for span in one.spans)
    assert not any(isinstance(span, slice) for span in apart.spans)
    torch.testing.assert_close(one.scores(), apart.scores())
    for gone in (2, 0, 3):
        for fit in (one, apart):
            fit.remove(gone)
        torch.testing.assert_close(one.scores(), apart.scores())


def test_what_removals_leave_is_the_ridge_regression_without_them():
    own, x, _ = table(list(range(INPUTS)))
    fit = _Fit(own, 1)
    before = own.weights[1].clone()
    fit.remove(1)
    fit.remove(3)
    kept = [0, 1, 4, 5]
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    wanted = torch.linalg.solve(covariance[kept][:, kept], covariance[kept] @ before)
    torch.testing.assert_close(fit.weights[kept], wanted)
    assert not fit.weights[[2, 3, 6, 7]].any()
