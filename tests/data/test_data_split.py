import numpy as np
import pytest
import torch

from sparsereg.data import Split
from sparsereg.errors import InputError


@pytest.mark.parametrize(
    ("val_size", "num_val"), [(5000, 5000), (0.1, 5000), (0, 0), (1e-9, 1), (49_999, 49_999)]
)
def test_parts_are_disjoint_and_complete(val_size, num_val):
    split = Split.draw(50_000, val_size, seed=42)
    assert len(split.val) == num_val
    together = torch.cat([split.train, split.val])
    assert torch.equal(together.sort().values, torch.arange(50_000))


def test_own_seed():
    before = torch.random.get_rng_state()
    first = Split.draw(1000, 100, seed=42)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(Split.draw(1000, 100, seed=42).val, first.val)
    assert not torch.equal(Split.draw(1000, 100, seed=43).val, first.val)
    assert Split.draw(1000, 100, seed=42).digest == first.digest != Split.draw(1000, 100, seed=43).digest


def test_the_split_stays_what_it_is_in_later_versions():
    # Results are compared across versions on this split: a change here is a change of the data.
    split = Split.draw(50_000, 5000, seed=42)
    assert split.digest == "33ac55b8c59047f3de882e2dbad5b29b7b0da7320aa387f4cd7d9d9573314b67"


def test_round_trip(tmp_path):
    split = Split.draw(1000, 0.1, seed=7)
    path = split.save(tmp_path / "split.npz")
    again = Split.load(path)
    assert torch.equal(again.train, split.train)
    assert torch.equal(again.val, split.val)
    assert (again.seed, again.digest) == (7, split.digest)
    assert [p.name for p in tmp_path.iterdir()] == ["split.npz"]


def test_a_changed_file_is_refused(tmp_path):
    path = Split.draw(100, 10, seed=0).save(tmp_path / "split.npz")
    with np.load(path) as file:
        arrays = dict(file)
    arrays["train"] = arrays["train"][::-1]
    np.savez(path, **arrays)
    with pytest.raises(InputError, match="changed"):
        Split.load(path)


@pytest.mark.parametrize(
    "val_size", [-1, 100, 101, 1.0, 5.0, -0.5, 0.0, float("nan"), True, "a", None, 0.999]
)
def test_wrong_val_size(val_size):
    with pytest.raises(InputError, match="val_size"):
        Split.draw(100, val_size, seed=0)
