"""Checkpoints survive: other disks for temporary files, kills, full disks, flipped bits."""

import os
import resource

import pytest
import torch

from sparsereg.files import LEFTOVER


@pytest.mark.costly
def test_a_checkpoint_is_written_beside_its_place(run, tiny, tmp_path, monkeypatch):
    """Nothing goes through the folder of temporary files, which may be another disk."""
    nowhere = tmp_path / "nowhere"
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(nowhere))
        patch.setattr("tempfile.tempdir", str(nowhere))
        done = run("train", *tiny, "trainer.max_epochs=1", "finetune.epochs=1", "ema_decay=0.9")
    assert done.code == 0, done.err
    names = {p.name for p in done.folder.rglob("*.ckpt")}
    assert names == {"last.ckpt", "best.ckpt", "gated.ckpt", "gated_best.ckpt"}
    for path in done.folder.rglob("*.ckpt"):
        assert b"sparsereg sha256 " in path.read_bytes()[-81:]
        torch.load(path, weights_only=True)


@pytest.mark.costly
def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(run, tiny):
    first = run("train", *tiny, "trainer.max_epochs=1")
    before = first.last.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        second = run("train", *tiny, "trainer.max_epochs=1", "logger=none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert second.code == 2, second.err
    errors = [line for line in second.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "ckpt cannot be written: " in errors[0]
    assert first.last.read_bytes() == before
    written = os.listdir("outputs/train/tblog/lightning_logs/version_1/checkpoints")
    assert not [n for n in written if n.startswith(LEFTOVER) or n.endswith(".ckpt")]


@pytest.mark.costly
def test_a_flipped_bit_is_refused_by_every_reader(run, tiny):
    first = run("train", *tiny, "trainer.max_epochs=1")
    data = bytearray(first.last.read_bytes())
    data[len(data) // 2] ^= 1
    first.last.write_bytes(data)
    for name, arguments in (
        ("test", [f"ckpt_path={first.last}"]),
        ("train", [f"ckpt_path={first.last}", "resume_training=true", "trainer.max_epochs=2"]),
        ("train", [*tiny, f"distill.ckpt_path={first.last}"]),
    ):
        refused = run(name, *arguments)
        assert refused.code == 2
        assert "it was changed after it was written" in refused.err
