import numpy as np
import pytest
import torch

from sparsereg.calibration.solver.losses import LOSSES, TargetLoss, check_loss, group_shares

TARGETS = torch.tensor([5.0, -1.0, 0.0, 100.0, -30.0, 2.0], dtype=torch.float64)
TOTALS = torch.tensor([4.0, -0.5, 0.1, 350.0, -31.0, 2.0 + 1e-3], dtype=torch.float64)
SHARES = torch.tensor([1.0, 2.0, 0.5, 0.25, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_by_totals_is_the_gradient_and_never_nan(name):
    loss = TargetLoss(TARGETS, SHARES, name)
    totals = TOTALS.clone().requires_grad_()
    loss.value(totals).backward()
    assert torch.isfinite(totals.grad).all()
    torch.testing.assert_close(loss.gradient_by_totals(TOTALS), totals.grad, rtol=1e-12, atol=0)


def test_values_by_hand():
    targets = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    totals = torch.tensor([2.0, -7.0, 0.5], dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    errors = np.array([0.5, 3.0, 0.5])  # over |target| + 1
    by_name = {name: float(TargetLoss(targets, ones, name).value(totals)) for name in LOSSES}
    assert by_name["relative"] == pytest.approx((errors**2).sum())
    assert by_name["mape"] == pytest.approx(errors.sum())
    assert by_name["capped"] == pytest.approx(np.minimum(errors, 1).sum())
    assert by_name["mse"] == pytest.approx(1 + 36 + 0.25)


@pytest.mark.parametrize("name", ["mape", "capped"])
def test_the_quadratic_bound_touches_and_lies_above(name):
    loss = TargetLoss(TARGETS, SHARES, name)
    touching = loss.bound(TOTALS)
    constant = float(loss.value(TOTALS) - touching.value(TOTALS))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = TOTALS + torch.randn(6, generator=generator, dtype=torch.float64) * TARGETS.abs()
        assert float(loss.value(other)) <= float(touching.value(other)) + constant + 1e-9
    slope = 2.0 * touching.half_gradient_by_totals(TOTALS)
    torch.testing.assert_close(slope, loss.gradient_by_totals(TOTALS), rtol=1e-10, atol=1e-14)


def test_group_shares():
    groups = np.array(["a", "b", "a", "b", "b"])
    np.testing.assert_allclose(group_shares(5, groups), [1 / 2, 1 / 3, 1 / 2, 1 / 3, 1 / 3])
    plain = group_shares(5, groups, normalize=False, multipliers={"a": 4.0})
    np.testing.assert_allclose(plain, [4, 1, 4, 1, 1])
    weighted = group_shares(5, groups, target_weights=np.array([1, 2, 3, 4, 5.0]))
    np.testing.assert_allclose(weighted, [1 / 2, 2 / 3, 3 / 2, 4 / 3, 5 / 3])
    with pytest.raises(ValueError, match="'c' not found"):
        group_shares(5, groups, multipliers={"c": 1.0})
    with pytest.raises(ValueError, match="requires target_groups"):
        group_shares(5, multipliers={"a": 1.0})


def test_unknown_loss_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"relative, mse, mape, capped, got 'relativ' \(did you mean 'relative'"
    ):
        check_loss("relativ")
    with pytest.raises(ValueError, match="cap must be"):
        TargetLoss(TARGETS, SHARES, "capped", cap=0.0)
