import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sparsereg.data import ImageArrays, ImageFiles
from sparsereg.data import download as download_module
from sparsereg.data.cifar10 import Cifar10
from sparsereg.data.digits import Digits
from sparsereg.data.image_file import read_image
from sparsereg.data.image_folder import FileStore, ImageFolder
from sparsereg.data.mnist import Mnist
from sparsereg.data.npz import Npz
from sparsereg.errors import InputError

# Worker processes are forked while PyTorch's threads exist, and a small machine has few processors.
WORKERS = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


# ---- arrays


def test_arrays_are_checked(arrays):
    good = vars(arrays())
    wrong = {
        "uint8": {"train_images": good["train_images"].float()},
        "channels x height x width": {"test_images": good["test_images"][0]},
        "empty": {"test_images": good["test_images"][:0], "test_labels": good["test_labels"][:0]},
        "contiguous": {"train_images": good["train_images"].transpose(2, 3)},
        "int64": {"train_labels": good["train_labels"].int()},
        "one label for each of 50": {"train_labels": good["train_labels"][:-1]},
        r"0\.\.4, got 0\.\.5": {"test_labels": good["test_labels"] + (good["test_labels"] == 4).long()},
        r"0\.\.4, got -1": {"test_labels": good["test_labels"] - 1},
        "agree": {"test_images": good["test_images"][:, :1].contiguous()},
    }
    assert ImageArrays(**good).image_shape == (3, 8, 8)
    for match, change in wrong.items():
        with pytest.raises(InputError, match=match):
            ImageArrays(**{**good, **change})


# ---- digits


def test_digits_are_the_same_every_time_and_stratified():
    first, second = Digits().load(), Digits().load()
    assert first.image_shape == (1, 32, 32)
    assert (len(first.train_labels), len(first.test_labels)) == (1437, 360)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    counts = {part: torch.bincount(getattr(first, f"{part}_labels")) for part in ("train", "test")}
    share = counts["test"] / (counts["test"] + counts["train"])
    assert (share - 0.2).abs().max() < 1 / 150
    assert first.train_images.max() == 255
    assert first.class_names == tuple("0123456789")


def test_digits_test_images_are_not_among_the_training_images():
    # The enlarged images keep the totals of grey of the originals: all 1,797 are there once.
    from sklearn.datasets import load_digits

    digits = Digits().load()
    both = torch.cat([digits.train_images, digits.test_images]).double().mean((1, 2, 3)).sort().values
    raw = torch.from_numpy(load_digits().images).mean((1, 2)).mul(255 / 16).sort().values
    assert torch.allclose(both, raw, atol=0.5, rtol=0)


# ---- npz


def good_npz(**changes):
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (12, 5, 4, 3), dtype=np.uint8),
        "train_labels": (np.arange(12) % 3).astype(np.uint8),
        "test_images": rng.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8),
        "test_labels": (np.arange(6) % 3).astype(np.uint8),
        **changes,
    }
    return {key: value for key, value in arrays.items() if value is not None}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_round_trip(tmp_path, save):
    arrays = good_npz()
    save(tmp_path / "a.npz", **arrays)
    data = Npz(str(tmp_path / "a.npz")).load()
    assert data.class_names == ("0", "1", "2")
    assert np.array_equal(data.train_images.numpy().transpose(0, 2, 3, 1), arrays["train_images"])
    assert data.test_labels.tolist() == arrays["test_labels"].tolist()


def test_npz_grey_and_named(tmp_path):
    grey = good_npz(train_images=np.zeros((12, 5, 4), np.uint8), test_images=np.zeros((6, 5, 4), np.uint8),
                    train_labels=np.zeros(12, np.int64), class_names=np.array(["a", "b", "c"]))  # fmt: skip
    np.savez(tmp_path / "a.npz", **grey)
    data = Npz(str(tmp_path / "a.npz")).load()
    assert data.image_shape == (1, 5, 4)
    assert data.class_names == ("a", "b", "c")


def labels(*values):
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(("changes", "match"), [
    ({"test_labels": None}, "no array named test_labels; needed: .*; found: train_images"),
    ({"train_images": np.zeros((12, 5, 4, 3), np.float32)}, "train_images must be uint8 .* got float32"),
    ({"train_images": np.zeros((12, 60), np.uint8)}, "train_images must be images x height x width"),
    ({"train_images": np.zeros((12, 3, 5, 7), np.uint8)}, "got 12 x 3 x 5 x 7"),
    ({"train_images": np.zeros((0, 5, 4, 3), np.uint8), "train_labels": labels()}, "empty"),
    ({"train_images": np.zeros((), np.uint8)}, "got a single number"),
    ({"test_images": np.zeros((6, 5, 5, 3), np.uint8)}, "must agree"),
    ({"test_images": np.zeros((6, 5, 4), np.uint8)}, "must agree"),
    ({"train_labels": np.zeros(12)}, "train_labels must be integers, got float64"),
    ({"train_labels": np.zeros((12, 1), np.uint8)}, "one integer per image, got shape 12 x 1"),
    ({"train_labels": np.zeros(11, np.uint8)}, "one label for each of 12 images"),
    ({"train_labels": np.arange(12) % 3 + 1}, "class 0 has no image"),
    ({"train_labels": labels(*[0] * 11, 10**6)}, "class 1 has no image"),
    ({"train_labels": labels(*[0] * 11, -1)}, "count from 0, got -1..0"),
    ({"test_labels": labels(0, 1, 2, 3, 0, 0)}, r"test_labels must lie in 0\.\.2, got 0\.\.3"),
    ({"class_names": np.array(["a", "b"])}, r"train_labels must lie in 0\.\.1"),
    ({"class_names": np.arange(3)}, "class_names must be one string per class"),
    ({"train_labels": np.array([object()] * 12)}, "not a readable .npz archive .*allow_pickle"),
])  # fmt: skip
def test_npz_with_wrong_arrays(tmp_path, changes, match):
    np.savez(tmp_path / "a.npz", **good_npz(**changes))
    with pytest.raises(InputError, match=match) as caught:
        Npz(str(tmp_path / "a.npz")).load()
    assert "a.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def damaged(kind, path):
    np.savez_compressed(path, **good_npz())
    whole = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("train_images, train_labels\n1, 2\n")
    elif kind == "flipped":
        middle = whole.index(b"train_images.npy") + 120
        path.write_bytes(
            whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 40]) + whole[middle + 40 :]
        )
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for key in good_npz():
                archive.writestr(f"{key}.npy", b"nothing")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "missing":
        path.unlink()


@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "text", "flipped", "array", "zip", "folder", "missing"]
)
def test_damaged_npz(tmp_path, kind):
    path = tmp_path / "a.npz"
    damaged(kind, path)
    with pytest.raises(InputError, match="a.npz: ") as caught:
        Npz(str(path)).load()
    assert "\n" not in str(caught.value)


def test_npz_without_a_path():
    with pytest.raises(InputError, match="data.path=FILE.npz"):
        Npz().load()


# ---- image folder


def test_folder_in_memory(folder):
    data = ImageFolder(str(folder), image_size=6, num_workers=0).load()
    assert isinstance(data, ImageArrays)
    assert data.class_names == ("cat", "dog")
    assert data.train_labels.tolist() == [0] * 6 + [1] * 6
    assert data.test_images.shape == (6, 3, 6, 6)
    raw = np.asarray(Image.open(folder / "train" / "dog" / "0.png"))
    # 6 x 10 to 6 x 6: nothing to scale, the middle is cut out.
    assert np.array_equal(data.train_images[6].permute(1, 2, 0).numpy(), raw[:, 2:8])


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=WORKERS)])
def test_folder_that_does_not_fit_gives_the_same_images(folder, num_workers):
    files = ImageFolder(str(folder), image_size=8, max_memory_gb=0, num_workers=num_workers).load()
    assert isinstance(files, ImageFiles)
    whole = ImageFolder(str(folder), image_size=8, num_workers=0).load()
    store = FileStore(files.train_paths, files.image_shape, num_workers)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).split(5)
    for positions, images in zip(order, store.batches(order, torch.device("cpu")), strict=True):
        assert torch.equal(images, whole.train_images[positions])


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=WORKERS)])
@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_an_unreadable_image_is_named(folder, content, num_workers):
    bad = folder / "train" / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60] if content is None else content)
    with pytest.raises(InputError, match=r"train/dog/3.png: this image cannot be read") as caught:
        ImageFolder(str(folder), num_workers=num_workers).load()
    assert "\n" not in str(caught.value)


def test_folder_with_wrong_classes(folder):
    (folder / "train" / "owl").mkdir()
    with pytest.raises(InputError, match="'owl' is in train/ but not in test/"):
        ImageFolder(str(folder)).load()
    (folder / "test" / "owl").mkdir()
    with pytest.raises(InputError, match="no images in .*train/owl"):
        ImageFolder(str(folder)).load()


def test_folder_that_is_not_one(tmp_path):
    for root, match in (
        (None, "data.root=FOLDER"),
        (tmp_path / "no", "no folder"),
        (tmp_path, "no folder .*train"),
    ):
        with pytest.raises(InputError, match=match):
            ImageFolder(None if root is None else str(root)).load()
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(InputError, match="no class folders"):
        ImageFolder(str(tmp_path)).load()


def test_hidden_files_are_no_images(folder):
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (folder / "train" / ".cache").mkdir()
    assert len(ImageFolder(str(folder), num_workers=0).load().train_labels) == 12


@pytest.mark.parametrize(("changes", "match"), [
    ({"image_size": 0}, "image_size"), ({"channels": 2}, "channels"), ({"num_workers": -1}, "num_workers"),
    ({"max_memory_gb": float("nan")}, "max_memory_gb"),
])  # fmt: skip
def test_folder_with_wrong_settings(changes, match):
    with pytest.raises(InputError, match=match):
        ImageFolder("x", **changes)


def test_odd_formats(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert torch.equal(read_image(tmp_path / "grey.png", (3, 8, 8))[2], torch.from_numpy(grey))
    assert torch.equal(read_image(tmp_path / "grey.png", (1, 8, 8))[0], torch.from_numpy(grey))
    palette = Image.fromarray(grey).convert("P")
    palette.save(tmp_path / "palette.png", transparency=b"\x00\x01")
    assert read_image(tmp_path / "palette.png", (3, 8, 8)).shape == (3, 8, 8)
    Image.fromarray(grey.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="deep.png: .*8 bits"):
        read_image(tmp_path / "deep.png", (3, 8, 8))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turn by 90 degrees to see it upright
    Image.fromarray(grey).save(tmp_path / "turned.png", exif=turned)
    assert torch.equal(
        read_image(tmp_path / "turned.png", (1, 8, 8))[0], torch.from_numpy(np.rot90(grey, -1).copy())
    )


# ---- what torchvision fetches


@pytest.mark.parametrize(
    ("source", "cls", "title"), [(Cifar10, "CIFAR10", "CIFAR-10"), (Mnist, "MNIST", "MNIST")]
)
def test_no_data_and_no_network(tmp_path, monkeypatch, source, cls, title):
    import torchvision.datasets

    def no_network(self):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(getattr(torchvision.datasets, cls), "download", no_network)
    with pytest.raises(
        InputError, match=rf"{title} is not in .* could not be fetched .*data=digits"
    ) as caught:
        source(str(tmp_path)).load()
    assert "\n" not in str(caught.value)


def python2_pickle(pixels, labels):
    """The pickle of {"data": pixels, "labels": labels} as Python 2 and its NumPy wrote CIFAR-10's."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n"
        b"(I%d\nI%d\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n"
        % pixels.shape
        + b"S%s\ntb" % repr(pixels.tobytes().decode("latin1")).encode("latin1", "backslashreplace")
    )
    listed = b"(l" + b"".join(b"I%d\na" % k for k in labels)
    return b"(dS'data'\n" + array + b"sS'labels'\n" + listed + b"s."


def test_cifar10_as_torchvision_keeps_it(tmp_path, monkeypatch):
    import torchvision.datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 2, 3 * 32 * 32), dtype=np.uint8)
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    for name, batch in zip(names, pixels, strict=True):
        (folder / name).write_bytes(python2_pickle(batch, [3, 7]))
    classes = [f"class {k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    # The checksums are those of the real files.
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    data = Cifar10(str(tmp_path)).load()
    assert data.class_names == tuple(classes)
    assert np.array_equal(data.train_images.numpy(), pixels[:5].reshape(10, 3, 32, 32))
    assert np.array_equal(data.test_images.numpy(), pixels[5].reshape(2, 3, 32, 32))
    assert data.train_labels.tolist() == [3, 7] * 5


def test_mnist_as_torchvision_keeps_it(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        head = struct.pack(">IIII", 0x803, 3, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 3) + bytes([5, 0, 9]))
    data = Mnist(str(tmp_path)).load()
    assert np.array_equal(data.test_images[:, 0].numpy(), images)
    assert data.train_labels.tolist() == [5, 0, 9]
    assert len(data.class_names) == 10


class Fetched:
    """Stands for a torchvision data set that is not there until it is downloaded."""

    classes = ("a", "b")
    downloads = 0
    there = False

    def __init__(self, root, train, download):
        if download and not Fetched.there:
            print("Downloading")
            Fetched.there, Fetched.downloads = True, Fetched.downloads + 1
        if not Fetched.there:
            raise RuntimeError("Dataset not found or corrupted.")
        num = 4 if train else 2
        self.data = np.arange(num * 12, dtype=np.uint8).reshape(num, 2, 2, 3)
        self.targets = [k % 2 for k in range(num)]


def test_fetched_once_and_quietly(capsys, tmp_path):
    for _ in range(2):
        train, test = download_module.fetched("Title", "name", str(tmp_path), Fetched)
    data = download_module.as_arrays("name", train, test)
    assert Fetched.downloads == 1
    assert capsys.readouterr().out == ""
    assert data.train_images[1, 2, 0, 1].item() == 12 + 1 * 3 + 2
    assert data.test_labels.tolist() == [0, 1]


# ---- real data, when a folder with cifar10.npz and mnist.npz is named


@pytest.mark.parametrize(("name", "shape", "num_train"), [
    ("cifar10", (3, 32, 32), 50_000), ("mnist", (1, 28, 28), 60_000),
])  # fmt: skip
def test_real_data(name, shape, num_train):
    folder = os.environ.get("SPARSEREG_TEST_DATA")
    if not folder or not os.path.exists(os.path.join(folder, f"{name}.npz")):
        pytest.skip(f"SPARSEREG_TEST_DATA names no folder with {name}.npz")
    data = Npz(os.path.join(folder, f"{name}.npz")).load()
    assert data.image_shape == shape
    assert (len(data.train_labels), len(data.test_labels)) == (num_train, 10_000)
    assert len(data.class_names) == 10


def test_digits_of_another_size():
    small, large = Digits(image_size=8).load(), Digits().load()
    assert small.train_images.shape[1:] == (1, 8, 8)
    assert large.train_images.shape[1:] == (1, 32, 32)
    assert torch.equal(small.train_labels, large.train_labels)
    with pytest.raises(InputError, match="image_size"):
        Digits(image_size=7)
