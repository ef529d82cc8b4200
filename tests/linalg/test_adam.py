"""Adam of our own takes the steps of torch.optim.Adam."""

import pytest
import torch

from sparsereg.linalg.adam import adam_step


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_steps_are_those_of_torch(buffered, size):
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(500, generator=generator)
    theirs = torch.nn.Parameter(ours.clone())
    reference = torch.optim.Adam([theirs], 0.05)
    first, second = torch.zeros(2, 500)
    buffer = torch.empty(500) if buffered else None
    for step in range(1, 31):
        gradient = size * torch.randn(500, generator=generator)
        theirs.grad = gradient.clone()
        adam_step(ours, gradient, first, second, step, 0.05, buffer)
        reference.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
