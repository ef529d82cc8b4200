"""Folders of images that were made to hurt: refused by name, and nothing in them is run or waited for."""

import contextlib
import os
import shutil
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from sparsereg.data import image_file
from sparsereg.data.image_file import FORMATS, MAX_PIXELS, check_file, read_image
from sparsereg.data.image_folder import ImageFolder
from sparsereg.errors import InputError

SHAPE = (3, 8, 8)


def refused(folder: Path, match: str) -> None:
    """The folder is refused by one line, by the list of files or at the latest when they are read."""
    with pytest.raises(InputError, match=match) as caught:
        ImageFolder(str(folder), num_workers=0).load()
    assert "\n" not in str(caught.value)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that claims a size, with whatever data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6)


# ---- formats


@pytest.mark.parametrize("name", ["3.png", "3.eps", "3.jpg"])
def test_postscript_is_not_run(folder, tmp_path, name):
    """With Ghostscript installed, Pillow would run this program."""
    proof = tmp_path / "was_here"
    (folder / "train" / "dog" / name).write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
        f"({proof}) (w) file dup (ran) writestring closefile\nshowpage\n%%EOF\n"
    )
    refused(folder, rf"train/dog/{name}: this image cannot be read \(its content is none of BMP, GIF")
    assert not proof.exists()


def test_of_all_formats_that_pillow_knows_only_ours_are_read(tmp_path):
    Image.init()
    others = sorted(set(Image.OPEN) & set(Image.SAVE) - set(FORMATS) - {"DIB", "MPO"})
    image, written = Image.new("RGB", (8, 8)), []
    for kind in others:
        with contextlib.suppress(Exception):  # not with these pixels, or not with what is installed
            image.save(tmp_path / kind, format=kind)
            written.append(kind)
    assert {"EPS", "ICO"} <= set(written)
    for kind in written:
        with pytest.raises(InputError, match="its content is none of"):
            read_image(tmp_path / kind, SHAPE)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_content_counts_and_not_the_name(tmp_path, kind):
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / "image", format=kind)
    (tmp_path / "image").rename(tmp_path / "image.txt")
    assert abs(read_image(tmp_path / "image.txt", SHAPE).float().mean() - 90) < 2


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_truncated_images_are_named(tmp_path, kind, share):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path, format=kind)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=r"image\.png: this image cannot be read") as caught:
        read_image(path, SHAPE)
    assert "\n" not in str(caught.value)


# ---- sizes


@pytest.mark.parametrize(
    "content",
    [png(30_000, 30_000), png(2**31 - 1, 2**31 - 1), png(MAX_PIXELS + 1, 1), bmp(12_000, 9_000)],
    ids=["png", "largest png", "line", "bmp"],
)
def test_sizes_are_checked_before_anything_is_decoded(folder, monkeypatch, content):
    for path in folder.rglob("*.png"):
        path.write_bytes(content)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *args: pytest.fail("decoded"))
    refused(folder, "0.png: this image has more than 100,000,000 pixels")


def test_large_images_that_people_have_are_read(tmp_path):
    Image.new("L", (12_000, 8_000)).save(tmp_path / "camera.png")
    assert read_image(tmp_path / "camera.png", SHAPE).sum() == 0


def test_a_file_of_many_bytes_is_not_opened(folder, monkeypatch):
    path = folder / "train" / "dog" / "big.png"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room
    monkeypatch.setattr(image_file.os, "open", lambda *args: pytest.fail("opened"))
    refused(folder, r"big\.png: this file has 1,048,576 MiB, an image at most 512")


# ---- what is no file


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    place = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(place)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize(("make", "what"), [(make_pipe, "a pipe"), (make_socket, "a socket")])
@pytest.mark.parametrize("place", ["train/dog/3.png", "test/cat/deep/3.png", "train/odd"])
def test_pipes_and_sockets_are_named_and_not_waited_for(folder, make, what, place):
    path = folder / place
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    refused(folder, rf"{place}: this is {what}, expected an image file")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no such device")
def test_devices_are_named(folder):
    with pytest.raises(InputError, match="/dev/zero: this is a device"):
        check_file(Path("/dev/zero"), Path("/"))
    (folder / "train" / "dog" / "zero.png").symlink_to("/dev/zero")
    refused(folder, r"zero\.png: this link leads out of data.root, to /dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_file_that_became_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "late.png")
    with pytest.raises(InputError, match=r"late\.png: this is a pipe"):
        read_image(tmp_path / "late.png", SHAPE)


def test_files_that_may_not_be_read_are_named(folder, monkeypatch):
    monkeypatch.setattr(image_file.os, "access", lambda path, mode: "3.png" not in str(path))
    refused(folder, r"3\.png: this file cannot be read \(permission denied\)")


def test_folders_that_may_not_be_read_are_named(folder, monkeypatch):
    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    refused(folder, r"train/dog: this folder cannot be read \(Permission denied\)")


# ---- links


def test_a_link_to_a_file_inside_is_followed(folder):
    shutil.move(folder / "train" / "dog" / "3.png", folder / "kept.png")
    (folder / "train" / "dog" / "3.png").symlink_to("../../kept.png")
    assert len(ImageFolder(str(folder), num_workers=0).load().train_labels) == 12


def test_the_root_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert len(ImageFolder(str(tmp_path / "link"), num_workers=0).load().train_labels) == 12


@pytest.mark.parametrize(
    ("name", "target", "match"),
    [
        (
            "train/dog/9.png",
            "../../../secret.png",
            r"9\.png: this link leads out of data.root, to .*secret\.png",
        ),
        ("train/dog/9.png", "nothing.png", r"9\.png: this link leads nowhere"),
        ("train/dog/9.png", "9.png", r"9\.png: this link leads nowhere"),
        ("train/9.png", "9.png", r"9\.png: this link leads nowhere"),
        ("train/dog/up", "../..", "dog/up: this is a link to a folder"),
        ("train/owl", "dog", "train/owl: this is a link to a folder"),
        ("train/owl", "../../elsewhere", "train/owl: this is a link to a folder"),
    ],
)
def test_links_that_lead_astray_are_named(folder, name, target, match):
    Image.new("RGB", (8, 8)).save(folder.parent / "secret.png")
    (folder.parent / "elsewhere").mkdir()
    (folder / name).symlink_to(target)
    refused(folder, match)


def test_a_part_may_not_be_a_link(folder):
    shutil.rmtree(folder / "test")
    (folder / "test").symlink_to("train", target_is_directory=True)
    refused(folder, "images/test: this is a link to a folder")


# ---- order


def test_the_order_is_that_of_the_names(folder, monkeypatch):
    (folder / "train" / "dog" / "2").mkdir()
    for name in ("Z.png", "a.png", "2/b.png", "10.png"):
        shutil.copy(folder / "train" / "dog" / "0.png", folder / "train" / "dog" / name)

    def names():
        files = ImageFolder(str(folder), max_memory_gb=0, num_workers=0).load()
        return [str(p.relative_to(folder / "train" / "dog")) for p in files.train_paths[6:]]

    found = names()
    assert found == [
        "0.png",
        "1.png",
        "10.png",
        "2/b.png",
        *[f"{k}.png" for k in range(2, 6)],
        "Z.png",
        "a.png",
    ]

    real = os.scandir

    class Backwards:
        def __init__(self, path):
            with real(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(os, "scandir", Backwards)
    assert names() == found


def test_files_beside_the_classes_are_named_in_a_warning(folder, caplog):
    (folder / "train" / "labels.csv").write_text("a,b")
    with caplog.at_level("WARNING"):
        ImageFolder(str(folder), num_workers=0).load()
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder / 'train' / 'labels.csv'} lies beside the class folders and is not read"
    ]
