"""The largest of many values, against sorting them all."""

import pytest
import torch

from sparsereg.calibration.solver.pruning import largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 7, 99, 100, 120])
def test_largest_are_the_first_of_a_stable_descending_sort(count, dtype):
    for seed in range(20):
        values = torch.randint(0, 12, (100,), generator=torch.Generator().manual_seed(seed)).to(dtype)
        values[::9] = -torch.inf
        expected = torch.argsort(values, descending=True, stable=True)[:count].sort().values
        assert torch.equal(largest(values, count), expected)
