"""Damage to a binary file is found before anything of it is loaded: every flipped bit, every cut."""

import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sparsereg import archives
from sparsereg.calibration.reading.matrix_file import read_matrix
from sparsereg.compression import compact, load_compacted, save_compacted
from sparsereg.data.npz import Npz
from sparsereg.data.split import Split
from sparsereg.errors import DamagedFile, InputError
from sparsereg.layers.storage import load_csr, save_csr

CONTENT = {"weights": torch.arange(500.0), "name": "net", "numbers": [1, 2.5, None]}


def _flips(path: Path, number: int, seed: int = 0):
    """Flip one bit of a file at a time, at random places, and yield where."""
    data = path.read_bytes()
    rng = random.Random(seed)
    for _ in range(number):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        yield at, bit
    path.write_bytes(data)


def _sealed(folder: Path) -> dict[str, tuple[Path, object]]:
    net = compact(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()), torch.zeros(1, 4))
    archives.save_torch(folder / "last.ckpt", CONTENT)
    archives.save_npz(folder / "arrays.npz", {"x": np.arange(50)})
    save_compacted(net, folder / "compacted.pt")
    save_csr(torch.nn.Linear(8, 8), folder / "compacted.csr")
    Split.draw(40, 10, 0).save(folder / "split.npz")
    return {
        "checkpoint": (folder / "last.ckpt", archives.load_torch),
        "arrays": (folder / "arrays.npz", archives.load_npz),
        "compacted": (folder / "compacted.pt", load_compacted),
        "sparse rows": (folder / "compacted.csr", load_csr),
        "split": (folder / "split.npz", Split.load),
    }


@pytest.mark.parametrize("kind", ["checkpoint", "arrays", "compacted", "sparse rows", "split"])
def test_every_flipped_bit_of_our_files_is_found(tmp_path, kind):
    path, load = _sealed(tmp_path)[kind]
    load(path)
    size = path.stat().st_size
    for at, bit in _flips(path, 300):
        with pytest.raises((DamagedFile, InputError)):
            print(f"bit {bit} of byte {at} of {size}", load(path))
    load(path)


@pytest.mark.parametrize("kind", ["checkpoint", "arrays", "compacted"])
def test_every_bit_of_the_end_and_every_cut_is_found(tmp_path, kind):
    path, load = _sealed(tmp_path)[kind]
    data = path.read_bytes()
    for at in range(len(data) - 120, len(data)):
        for bit in range(8):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            with pytest.raises((DamagedFile, InputError)):
                load(path)
    for length in [0, 1, 4, 21, 22, 100, *range(len(data) - 110, len(data))]:
        path.write_bytes(data[:length])
        with pytest.raises((DamagedFile, InputError)):
            load(path)
    for more in (b"\0", data):
        path.write_bytes(data + more)
        with pytest.raises((DamagedFile, InputError)):
            load(path)


def test_files_without_a_seal_load_if_their_checksums_are_right(tmp_path):
    """Those of earlier versions, of NumPy, SciPy and PyTorch: a flip is found, or changes nothing."""
    torch.save(CONTENT, tmp_path / "old.ckpt")
    for _ in _flips(tmp_path / "old.ckpt", 300):
        try:
            found = archives.load_torch(tmp_path / "old.ckpt")
        except DamagedFile:
            continue
        assert found.keys() == CONTENT.keys()
        assert torch.equal(found.pop("weights"), CONTENT["weights"])
        assert found == {k: v for k, v in CONTENT.items() if k != "weights"}


@pytest.mark.parametrize("compressed", [False, True])
def test_matrices_of_scipy(tmp_path, compressed):
    matrix = sp.random_array((20, 30), density=0.3, rng=np.random.default_rng(0), format="csr")
    sp.save_npz(tmp_path / "m.npz", matrix, compressed=compressed)
    num_harmless = 0
    for _ in _flips(tmp_path / "m.npz", 300):
        try:
            found = read_matrix(tmp_path / "m.npz")
        except InputError:
            continue
        num_harmless += 1
        assert (found != matrix).nnz == 0
    assert num_harmless < 60


def test_other_programs_read_sealed_files(tmp_path):
    archives.save_torch(tmp_path / "a.ckpt", CONTENT)
    archives.save_npz(tmp_path / "a.npz", {"x": np.arange(5)})
    for mmap in (False, True):
        found = torch.load(tmp_path / "a.ckpt", weights_only=True, mmap=mmap)
        assert torch.equal(found["weights"], CONTENT["weights"])
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["x"].tolist() == [0, 1, 2, 3, 4]
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sparsereg sha256 ")


def test_a_copy_keeps_its_seal(tmp_path):
    archives.save_torch(tmp_path / "a.ckpt", CONTENT)
    copy = tmp_path / "elsewhere" / "b.pt"
    copy.parent.mkdir()
    copy.write_bytes((tmp_path / "a.ckpt").read_bytes())
    archives.load_torch(copy)


def test_weights_of_others(tmp_path):
    """In the old format the only checksum is the one that the name may hold."""
    state = {"w": torch.arange(5.0)}
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(archives.load_weights(tmp_path / "w.pth")["w"], state["w"])
    with pytest.raises(DamagedFile, match="not an archive"):
        archives.load_torch(tmp_path / "w.pth")
    (tmp_path / "w.pth").rename(tmp_path / "w-01234567.pth")
    with pytest.raises(DamagedFile, match="digest is not the one in its name"):
        archives.load_weights(tmp_path / "w-01234567.pth")
    torch.save(state, tmp_path / "new.pth")
    assert torch.equal(archives.load_weights(tmp_path / "new.pth")["w"], state["w"])


def test_only_data_are_loaded(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(DamagedFile, match="something else than data"):
        archives.load_torch(tmp_path / "module.pt")


@pytest.mark.parametrize("shape", ["(9999999999999999999999,)", "(-5,)", "(1, (", "'a'"])
def test_an_array_whose_header_cannot_be_is_refused(tmp_path, shape):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
        archive.writestr("train_images.npy", content + bytes(64))
        for name in ("train_labels", "test_images", "test_labels"):
            archive.writestr(f"{name}.npy", content)
    with pytest.raises(DamagedFile, match="something else than arrays"):
        archives.load_npz(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"not a readable \.npz archive"):
        Npz(str(tmp_path / "a.npz")).load()


@pytest.mark.parametrize("where", [lambda x: x, lambda x: {"state_dict": {"w": x}}, lambda x: [1, (x,)]])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(1).expand(10**12),
    ],
    ids=["sparse", "meta", "expanded"],
)
def test_tensors_that_nothing_can_be_computed_with_are_refused(tmp_path, tensor, where):
    torch.save(where(tensor), tmp_path / "a.pt")
    for read in (archives.load_torch, archives.load_weights):
        with pytest.raises(DamagedFile, match="it holds a tensor"):
            read(tmp_path / "a.pt")


def test_repeated_numbers_are_read_while_they_are_few(tmp_path):
    torch.save({"positions": torch.arange(512).expand(4, 512)}, tmp_path / "a.pt")
    assert archives.load_torch(tmp_path / "a.pt")["positions"].shape == (4, 512)
