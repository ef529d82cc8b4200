import itertools

import pytest
import pytorch_lightning as pl
import torch

from sparsereg.data.augment import Augmentation
from sparsereg.data.loader import DeviceLoader, EpochOrder, Normalise, Share, TensorStore, batch_bounds
from sparsereg.errors import InputError

# Lightning's own use of a deprecated function of PyTorch, and its remark where there is a GPU.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
]

NORMALISE = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
AUGMENT = Augmentation(flip=True, crop_scale=(0.5, 1.0), degrees=10, elastic=0.5)


def loader(
    num=50, batch_size=8, *, rank=0, num_processes=1, shuffle=True, augmentation=AUGMENT, seed=3, **kwargs
):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num + 10, 3, 8, 8), dtype=torch.uint8, generator=rng)
    # The label names the image, so that a test can tell which ones came.
    return DeviceLoader(
        TensorStore(images),
        torch.arange(num + 10),
        torch.arange(num) + 10,
        Normalise(*NORMALISE, **kwargs),
        batch_size=batch_size,
        augmentation=augmentation,
        shuffle=shuffle,
        seed=seed,
        share=Share(rank, num_processes),
    )


def run(loader, epoch=0):
    loader.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_image_once(num_processes, shuffle):
    for num, batch_size in itertools.product((7, 16, 33, 50), (2, 5, 8)):
        parts = [
            loader(num, batch_size, rank=r, num_processes=num_processes, shuffle=shuffle)
            for r in range(num_processes)
        ]
        batches = [list(part) for part in parts]
        assert {len(b) for b in batches} == {len(parts[0])} == {-(-num // (batch_size * num_processes))}
        assert all(1 <= len(y) <= batch_size for b in batches for _, y in b)
        labels = torch.cat([y for b in batches for _, y in b])
        assert sorted(labels.tolist()) == list(range(10, num + 10))
        for step in zip(*batches, strict=True):  # as evenly as can be
            sizes = [len(y) for _, y in step]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_together_make_the_batches_of_one(num_processes):
    for num in (40, 50, 65, 79):
        alone = list(loader(num, 16))
        shares = [
            loader(num, 16 // num_processes, rank=r, num_processes=num_processes)
            for r in range(num_processes)
        ]
        for (x, y), *parts in zip(alone, *shares, strict=True):
            assert torch.equal(torch.cat([part[1] for part in parts]), y)
            assert torch.equal(torch.cat([part[0] for part in parts]), x)


def test_an_epoch_depends_on_its_number_only():
    straight = loader()
    passes = {epoch: run(straight, epoch) for epoch in (0, 1, 2)}
    fresh = run(loader(), 2)  # no epoch before it
    assert all(torch.equal(a, b) for a, b in zip(fresh, passes[2], strict=True))
    assert not torch.equal(passes[0][1], passes[1][1])
    # A pass that was abandoned leaves no trace.
    broken_off = loader()
    next(iter(broken_off))
    assert torch.equal(run(broken_off, 1)[0], passes[1][0])
    assert not torch.equal(run(loader(seed=4))[1], passes[0][1])


def test_augmentation_changes_from_epoch_to_epoch_but_not_the_order_of_a_fixed_one():
    fixed = loader(shuffle=False)
    first, second = run(fixed, 0), run(fixed, 1)
    assert torch.equal(first[1], torch.arange(10, 60))
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])


def test_the_order_is_a_uniform_permutation():
    # Over many epochs each image is first equally often: chi-square with 9 degrees of freedom.
    order = EpochOrder(10, seed=1, shuffle=True)
    counts = torch.zeros(10)
    for epoch in range(2000):
        order.set_epoch(epoch)
        counts[order.order()[0]] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # quantile 0.999


def test_evaluation_batches_are_normalised_exactly():
    plain = loader(augmentation=None, shuffle=False)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in NORMALISE)
    x, y = run(plain)
    expected = (plain.store.images[y].double() / 255 - mean) / std
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-6)
    assert x.dtype == torch.float32


@pytest.mark.parametrize("augmentation", [None, AUGMENT])
def test_memory_format(augmentation):
    for channels_last, memory_format in ((True, torch.channels_last), (False, torch.contiguous_format)):
        x, _ = next(iter(loader(augmentation=augmentation, channels_last=channels_last)))
        assert x.is_contiguous(memory_format=memory_format)


def test_batch_bounds():
    assert batch_bounds(256, 128) == [(0, 128), (128, 256)]
    assert batch_bounds(45_000, 128)[-2:] == [(351 * 128 - 128, 351 * 128), (351 * 128, 45_000)]
    assert batch_bounds(129, 128) == [(0, 65), (65, 129)]  # never a batch of one
    assert batch_bounds(5, 128) == [(0, 5)]
    assert batch_bounds(0, 128) == []
    for num, size in itertools.product(range(1, 60), range(1, 12)):
        bounds = batch_bounds(num, size)
        assert [start for start, _ in bounds] == [0] + [stop for _, stop in bounds[:-1]]
        assert bounds[-1][1] == num
        assert len(bounds) == -(-num // size)
        assert min(b - a for a, b in bounds) >= min(num, size // 2)


def test_too_few_images_for_the_processes():
    with pytest.raises(InputError, match="1 images .* one of 2 processes without an image"):
        loader(1, 8, num_processes=2)
    with pytest.raises(InputError, match="batch_size of at least 2"):
        loader(7, 1, num_processes=2)
    with pytest.raises(InputError, match="no images"):
        loader(0, 8)


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch[0].sum().item(), batch[1].tolist()))
        return (self.weight * batch[0].mean()).square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, epochs, **kwargs):
    return pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **kwargs,
    )  # fmt: skip


def test_in_a_trainer_two_epochs_and_two_more_are_four(tmp_path):
    straight, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, 4).fit(straight, loader())
    start = trainer(tmp_path, 2)
    start.fit(first, loader())
    start.save_checkpoint(tmp_path / "two.ckpt")
    trainer(tmp_path, 4).fit(second, loader(), ckpt_path=tmp_path / "two.ckpt")
    assert first.seen + second.seen == straight.seen
    assert [seen[0] for seen in straight.seen] == [e for e in range(4) for _ in range(7)]
    assert len({tuple(seen[2]) for seen in straight.seen}) == 28


def test_in_a_trainer_limits_hold(tmp_path):
    model = Recorder()
    trainer(tmp_path, 1, limit_train_batches=3).fit(model, loader())
    assert [seen[2] for seen in model.seen] == [y.tolist() for _, y in list(loader())[:3]]
