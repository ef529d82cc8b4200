"""A text in three parts that share nothing, and windows of it that only seed and epoch decide."""

import os

import numpy as np
import pytest
import torch

from sparsereg.data import build
from sparsereg.data.corpus import TextSource
from sparsereg.data.loader import Share
from sparsereg.data.text import WindowLoader
from sparsereg.errors import InputError


def folder_of(tmp_path, num=40):
    place = tmp_path / "texts"
    (place / "deep").mkdir(parents=True)
    for k in range(num):
        name = f"deep/{k:02}.txt" if k % 2 else f"{k:02}.txt"
        (place / name).write_bytes(bytes([k]) * (50 + 7 * k))
    return place


def stretches(part):
    return [part.text[a:b] for a, b in zip(part.starts, part.stops, strict=True)]


def test_a_folder_is_divided_file_by_file(tmp_path):
    corpus = TextSource(str(folder_of(tmp_path))).load(0.2, 0.2, 0, 10)
    owners = [
        set(np.concatenate(stretches(p)).tolist()) - {0} for p in (corpus.train, corpus.val, corpus.test)
    ]
    assert corpus.num_files == 40
    assert set.union(*owners) == set(range(1, 40))
    assert sum(map(len, owners)) == 39  # no file in two parts
    total = corpus.train.num_bytes + corpus.val.num_bytes + corpus.test.num_bytes
    assert total == len(corpus.train.text) == sum(50 + 7 * k for k in range(40)) + 40
    assert 0.15 < corpus.val.num_bytes / total < 0.3
    again = TextSource(str(tmp_path / "texts")).load(0.2, 0.2, 0, 10)
    other = TextSource(str(tmp_path / "texts")).load(0.2, 0.2, 1, 10)
    assert again.sha256 == corpus.sha256 != other.sha256


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("largest", [2_000, 300_000])
def test_one_large_file_leaves_each_part_its_share(tmp_path, seed, largest):
    place = folder_of(tmp_path)
    (place / "large.txt").write_bytes(bytes(largest))
    corpus = TextSource(str(place)).load(0.1, 0.1, seed, 10)
    total = len(corpus.train.text)
    assert 0.1 <= corpus.test.num_bytes / total < 0.2
    assert 0.1 <= corpus.val.num_bytes / total < 0.2


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_a_file_is_divided_in_blocks_and_may_stay_on_the_disk(tmp_path, memory):
    file = tmp_path / "one.bin"
    content = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8)
    file.write_bytes(content.tobytes())
    corpus = TextSource(str(file), max_memory_gb=memory).load(0.1, 0.1, 3, 16)
    assert isinstance(corpus.train.text, np.memmap) == (memory == 0)
    taken = np.zeros(len(content), dtype=int)
    for part in (corpus.train, corpus.val, corpus.test):
        for a, b in zip(part.starts, part.stops, strict=True):
            taken[a:b] += 1
            assert np.array_equal(part.text[a:b], content[a:b])
    assert (taken == 1).all()
    assert 800 < corpus.test.num_bytes < 1300


def test_windows_stay_within_their_part_and_cover_it(tmp_path):
    corpus = TextSource(str(folder_of(tmp_path))).load(0.2, 0.2, 0, 10)
    part = corpus.val
    inside = np.zeros(len(part.text), dtype=bool)
    for a, b in zip(part.starts, part.stops, strict=True):
        inside[a:b] = True
    drawn = part.drawn(30_000, 10, np.random.default_rng(0))
    assert inside[drawn[:, None] + np.arange(11)].all()
    assert len(np.unique(drawn)) == part.places(10).sum()  # every place is drawn
    in_turn = part.in_turn(None, 10)
    assert inside[in_turn[:, None] + np.arange(11)].all()
    assert (np.diff(in_turn) >= 10).all()
    few = part.in_turn(5, 10)
    assert len(few) == 5
    assert set(few) <= set(in_turn)


def test_epochs_are_functions_of_seed_and_epoch(tmp_path):
    part = TextSource(str(folder_of(tmp_path))).load(0.2, 0.2, 0, 10).train
    loader = WindowLoader(part, 10, 20, 8, seed=1)

    def windows(epoch, loader=loader):
        loader.set_epoch(epoch)
        return torch.cat([x for x, _ in loader])

    first = windows(0)
    assert not torch.equal(first, windows(1))
    assert torch.equal(first, windows(0))
    assert not torch.equal(first, windows(0, WindowLoader(part, 10, 20, 8, seed=2)))
    inputs, targets = next(iter(loader))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.dtype == torch.int64
    shares = [windows(0, WindowLoader(part, 10, 20, 4, seed=1, share=Share(r, 2))) for r in (0, 1)]
    together = sorted(map(tuple, torch.cat(shares).tolist()))
    assert together == sorted(map(tuple, first.tolist()))


def test_the_standard_library_is_there_on_every_machine():
    data = build({"name": "text", "train_windows": 10, "eval_windows": 5, "context": 64})
    data.setup()
    described = data.describe()
    assert described["num_files"] > 200
    assert described["train_bytes"] > 10 * described["test_bytes"] > 1e6
    tokens, _ = next(iter(data.train_dataloader()))
    assert data.form.example(3).shape == (3, 64)
    assert 32 in tokens  # spaces
    assert (data.num_val, data.num_test) == (5, 5)


def test_strange_files_are_named(tmp_path):
    place = folder_of(tmp_path)
    outside = tmp_path / "secret.txt"
    outside.write_text("not yours")
    cases = {
        "pipe.txt": (lambda p: os.mkfifo(p), "this is a pipe"),
        "nowhere.txt": (lambda p: p.symlink_to(tmp_path / "gone"), "leads nowhere"),
        "out.txt": (lambda p: p.symlink_to(outside), "leads out of data.path"),
        "circle.txt": (lambda p: p.symlink_to(p), "leads nowhere"),
    }
    for name, (make, message) in cases.items():
        make(place / name)
        with pytest.raises(InputError, match=message) as caught:
            TextSource(str(place)).load(0.1, 0.1, 0, 10)
        assert name in str(caught.value)
        (place / name).unlink()
    (place / "inside.txt").symlink_to(place / "03.txt" if (place / "03.txt").exists() else place / "02.txt")
    (place / "again").symlink_to(place, target_is_directory=True)  # a folder in a circle is not entered
    assert TextSource(str(place)).load(0.1, 0.1, 0, 10).num_files == 41


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "gone"}, "there is no such file or folder"),
        ({"path": "empty"}, "this file is empty"),
        ({"path": "short"}, "bytes leave no window of data.context=128 bytes"),
        ({"path": "texts", "pattern": "*.md"}, "matches data.pattern=[*].md"),
        ({"path": "texts", "max_memory_gb": 0.0}, "more than data.max_memory_gb=0"),
        ({"path": "pipe"}, "this is a pipe"),
        ({"val_size": 0.5, "test_size": 0.5}, "leave too little"),
        ({"context": 0}, r"data.context=0: expected an integer in \[1, 65536\]"),
    ],
)
def test_wrong_input(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"x" * 200)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=message):
        build({"name": "text", **given}).setup()
