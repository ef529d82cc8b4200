"""Files: every kind that the scripts read, damaged, edited, and made to do harm."""

import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import base, process
from .campaign import Attack
from .commands import Case
from .process import Outcome

Edit = Callable[[Path, random.Random], None]
"""Changes a file in place."""
CANARY = "touch CANARY"
"""What evil files try to run, in the folder of the case."""


class Evil:
    """Unpickling this runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (CANARY,)


EVIL_TEXT = (
    "__import__('os').system('touch CANARY')", "x=__import__('os').system('touch CANARY')",
    "${oc.env:SPARSEREG_FUZZ_SECRET}", "{_target_: os.system}",
    "os.system", "=cmd|' /C calc'!A0", "+1+1", "@SUM(A1)", "-2+3", "\t=1", "", " ", "nan", "inf", "-1",
    "1e400", "9" * 400, "a" * 70000, "é\u202e", "\x00", "\n", "\"", "'", "a,b", "None",
    "true", "12:30", "[]", "{}", "../../x", "/dev/zero", "lambda: 0", "torch.nn.Linear", "builtins.eval",
    "__class__", "1_0", "\u0661", "0x1f", "%s", "{0}", "<script>alert(1)</script>",
)  # fmt: skip
EVIL_VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 3, 2**70, 1.5, float("nan"), float("inf"), [], {},
[1, 2, 3], {"a": 1}, {"_target_": "os.system"}, "abc", *EVIL_TEXT)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A file, the commands that read it, and what can be done to it.

    Attributes:
        path: below the folder of the case.
        commands: any of them reads the file.
        edits: by name: how to change it, and what must come of it: refuse, any, or same (or refused).
    """

    path: str
    commands: tuple[tuple[str, tuple[str, ...]], ...]
    edits: dict[str, tuple[Edit, str]]


# --- bytes


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    """Leave out the end."""
    content = path.read_bytes()
    path.write_bytes(
        content[: rng.choice((0, 1, len(content) - 1, len(content) // 2, rng.randrange(len(content))))]
    )


def lose_block(path: Path, rng: random.Random) -> None:
    """Fill a piece with zeros, as a file system does after a crash."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    piece = content[start : start + rng.choice((16, 512, 4096))]
    if not any(piece):
        piece, start = content[: len(piece)], 0
    content[start : start + len(piece)] = bytes(len(piece))
    path.write_bytes(content)


def repeat(path: Path, rng: random.Random) -> None:
    """Write a piece twice."""
    content = path.read_bytes()
    start = rng.randrange(len(content))
    end = start + rng.choice((1, 16, 512))
    path.write_bytes(content[:end] + content[start:])


def other(path: Path, rng: random.Random) -> None:
    """Put something else in the place of the file."""
    kind = rng.randrange(8)
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to("nowhere")
    elif kind == 4:
        path.write_bytes(rng.randbytes(3000))
    elif kind == 5:
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == 6:
        path.write_bytes(b"PK\x05\x06" + bytes(18))
    else:
        path.write_text("<html><body>404</body></html>")


def bytes_edits(flipped: str, damaged: str) -> dict[str, tuple[Edit, str]]:
    """Return the changes that every file can suffer, and what is to come of them."""
    return {
        "flip": (flip, flipped), "cut": (cut, damaged), "zeros": (lose_block, damaged),
        "repeat": (repeat, damaged), "other": (other, "refuse"),
    }  # fmt: skip


# --- tables


def rows_edit(change: Callable[[list[list[str]], random.Random], None]) -> Edit:
    """Make an edit of the cells of a CSV file; cells are written as they are, unquoted where they can be."""

    def edit(path: Path, rng: random.Random) -> None:
        import csv

        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        change(rows, rng)
        out = io.StringIO(newline="")
        csv.writer(out, lineterminator="\n").writerows(rows)
        path.write_bytes(out.getvalue().encode(errors="surrogatepass"))

    return edit


def text_edit(change: Callable[[bytes, random.Random], bytes]) -> Edit:
    """Make an edit of a whole file."""

    def edit(path: Path, rng: random.Random) -> None:
        path.write_bytes(change(path.read_bytes(), rng))

    return edit


def _some_row(rows: list[list[str]], rng: random.Random) -> list[str]:
    return rows[rng.randrange(1, len(rows))]


def drop_column(name: str) -> Edit:
    """Leave out a column."""

    def change(rows: list[list[str]], rng: random.Random) -> None:
        column = rows[0].index(name)
        for row in rows:
            del row[column]

    return rows_edit(change)


def set_cell(name: str, values: tuple[str, ...]) -> Edit:
    """Write something else into a cell of a column."""

    def change(rows: list[list[str]], rng: random.Random) -> None:
        _some_row(rows, rng)[rows[0].index(name)] = rng.choice(values)

    return rows_edit(change)


def _double_column(rows: list[list[str]], rng: random.Random) -> None:
    column = rng.randrange(len(rows[0]))
    for row in rows:
        row.append(row[column])


def _evil_cell(rows: list[list[str]], rng: random.Random) -> None:
    row = rows[rng.randrange(len(rows))]
    row[rng.randrange(len(row))] = rng.choice(EVIL_TEXT)


def _copy_first(rows: list[list[str]], rng: random.Random) -> None:
    rows.append(list(rows[1]))


def _extra_column(rows: list[list[str]], rng: random.Random) -> None:
    name = rng.choice(
        (
            "weight",
            "parent",
            "scale",
            "tolerance",
            "hard",
            "of",
            "of_where",
            "unit",
            "note",
            "group",
            "measure",
            "where",
            "",
        )
    )
    rows[0].append(name)
    for row in rows[1:]:
        row.append(rng.choice((*EVIL_TEXT, "1", "0.5", "all")))


WRONG_NUMBERS = ("abc", "", "nan", "inf", "-inf", "1e400", "12:30", "1;5", "1 2", "--1", "1e", "[1]", "0x",
"=1+1", "one", "2020-01-01")  # fmt: skip


def table_edits(numbers: tuple[str, ...], needed: tuple[str, ...]) -> dict[str, tuple[Edit, str]]:
    """Return changes of a CSV file.

    Args:
        numbers: columns in which text must be refused.
        needed: columns without which it must be refused.
    """
    edits: dict[str, tuple[Edit, str]] = {
        "empty": (text_edit(lambda b, r: r.choice((b"", b"\n", b",,,\n", b"\xef\xbb\xbf"))), "refuse"),
        "header only": (text_edit(lambda b, r: b.split(b"\n")[0] + b"\n"), "refuse"),
        "no header": (text_edit(lambda b, r: b.split(b"\n", 1)[1]), "refuse"),
        "rows end with a comma": (text_edit(lambda b, r: b.split(b"\n", 1)[0] + b"\n" + b.split(b"\n",
        1)[1].replace(b"\n", b",\n")), "refuse"),
        "one row is longer": (rows_edit(lambda rows, r: _some_row(rows, r).append(r.choice(("5", "x")))),
        "refuse"),
        "one row is shorter": (rows_edit(lambda rows, r: _some_row(rows, r).pop()), "refuse"),
        "a column twice": (rows_edit(_double_column), "refuse"),
        "semicolons": (text_edit(lambda b, r: b.replace(b",", r.choice((b";", b"\t", b"|", b" ")))),
        "any"),
        "utf-16": (text_edit(lambda b, r: b.decode().encode("utf-16")), "same"),
        "compressed": (text_edit(lambda b, r: zlib.compress(b)), "refuse"),
        "byte order mark": (text_edit(lambda b, r: b"\xef\xbb\xbf" + b), "same"),
        "CRLF": (text_edit(lambda b, r: b.replace(b"\n", b"\r\n")), "same"),
        "latin-1": (text_edit(lambda b, r: b.replace(b"a", b"\xe4", 3)), "any"),
        "null bytes": (text_edit(lambda b, r: b.replace(b"1", b"\x00", 2)), "any"),
        "a quote": (text_edit(lambda b, r: b.replace(b"\n", b'\n"', 1)), "any"),
        "evil cell": (rows_edit(_evil_cell), "any"),
        "evil cells": (rows_edit(lambda rows, r: [_evil_cell(rows, r) for _ in range(5)] and None), "any"),
        "one more column": (rows_edit(_extra_column), "any"),
        "rows mixed": (rows_edit(lambda rows, r: rows.append(rows.pop(1))), "any"),
        "a row twice": (rows_edit(_copy_first), "any"),
        "huge cell": (rows_edit(lambda rows, r: _some_row(rows, r).__setitem__(0, "z" * 3_000_000)), "any"),
    }  # fmt: skip
    for name in numbers:
        edits[f"no number in {name}"] = (set_cell(name, WRONG_NUMBERS), "refuse")
    for name in needed:
        edits[f"without {name}"] = (drop_column(name), "refuse")
    return edits


WRONG_CONDITIONS = (
    "__import__('os').system('touch CANARY')", "age > __import__('os').system('touch CANARY')",
    "@os.system('touch CANARY')", "age >", "> 5", "age > 50 and", "(age > 50", "age > 50)", "nokey > 5",
    "age = 5 5", "area == A'", "age > 'x", "1" * 30000 + "x", "age > " + "9" * 30000 + "x",
    "(" * 5000 + "age > 5" + ")" * 5000, "not " * 20000 + "age > 5", "age > 5 and " * 20000, "age in [1,",
    "age.__class__ == 5",
    "age[0] > 5", "lambda: 0", "age > 5; area", "age if 1 else 2", "f'{age}' > 5",
    "age > ${oc.env:SPARSEREG_FUZZ_SECRET}", "`age` > 5", "age >> 5", "age > 5 or", "and", "''", "\x00",
    "age > \u0665x", "area > 5", "age == 'x' 'y'", "x ** 9999999 > 1", "age > 1e999x",
)  # fmt: skip


# --- archives of arrays


def arrays_edit(change: Callable[[dict[str, Any], random.Random], None]) -> Edit:
    """Make an edit of the arrays of an .npz file."""

    def edit(path: Path, rng: random.Random) -> None:
        with np.load(path) as file:
            content = dict(file)
        change(content, rng)
        np.savez(path, **content)

    return edit


def _drop_array(content: dict[str, Any], rng: random.Random) -> None:
    del content[rng.choice(sorted(content))]


def _evil_array(content: dict[str, Any], rng: random.Random) -> None:
    content[rng.choice(sorted(content))] = rng.choice((
        np.array([Evil()], dtype=object), np.array([]), np.array(5), np.array(["a", "b"]),
        np.array([1 + 2j]), np.zeros((2, 2, 2)), np.array([np.nan]), np.array([True]),
        np.array([2**63], np.uint64),
        np.array(["2020-01-01"], "datetime64[D]"), np.zeros(3, [("a", int), ("b", float)]), np.array([b"x"]),
        np.full((3, 3), -5), np.zeros((0, 5)),
    ))  # fmt: skip


def huge_header(path: Path, rng: random.Random) -> None:
    """An array that says to be larger than all memory."""
    shape = rng.choice(
        (
            "(1099511627776,)",
            "(4294967296, 4294967296)",
            "(-5,)",
            "(1,) * 10 ** 9",
            "(9999999999999999999999,)",
        )
    )
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    _rewrite_member(path, rng, lambda content: member + bytes(64))


def _rewrite_member(path: Path, rng: random.Random, change: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for member, content in members.items():
            archive.writestr(member, change(content) if member == name else content)


def evil_member(path: Path, rng: random.Random) -> None:
    """An archive whose member has something else in it, with a right checksum."""
    new = rng.choice(
        (pickle.dumps(Evil()), b"", b"\x93NUMPY", rng.randbytes(200), b"\x93NUMPY\x09\x00" + bytes(100))
    )
    _rewrite_member(path, rng, lambda content: new)


def member_twice(path: Path, rng: random.Random) -> None:
    """An archive with a member twice."""
    import warnings

    with zipfile.ZipFile(path) as archive:
        name = rng.choice(archive.namelist())
        content = bytearray(archive.read(name))
    content[-1] ^= 1
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(name, bytes(content))


def bomb(path: Path, rng: random.Random) -> None:
    """A small archive that unpacks to 16 GB."""
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (17179869184,), }".ljust(117) + "\n"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[rng.choice(sorted(members))] = start + bytes(
        64 << 20
    )  # says 16 GB, has 64 MB: enough to be refused
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for member, content in members.items():
            archive.writestr(member, content)


NPZ_EDITS: dict[str, tuple[Edit, str]] = {
    **bytes_edits("same", "same"),
    "an array is missing": (arrays_edit(_drop_array), "refuse"),
    "an array of something else": (arrays_edit(_evil_array), "refuse"),
    "huge header": (huge_header, "refuse"),
    "evil member": (evil_member, "refuse"),
    "a member twice": (member_twice, "refuse"),
    "bomb": (bomb, "refuse"),
}


def _matrix(change: Callable[[dict[str, Any], random.Random], None]) -> tuple[Edit, str]:
    return arrays_edit(change), "refuse"


def _put(name: str, *values: Any) -> tuple[Edit, str]:
    def change(content: dict[str, Any], rng: random.Random) -> None:
        content[name] = np.array(rng.choice(values))

    return _matrix(change)


def _at(name: str, *values: Any) -> tuple[Edit, str]:
    def change(content: dict[str, Any], rng: random.Random) -> None:
        array = content[name].copy()
        array[rng.randrange(len(array))] = rng.choice(values)
        content[name] = array

    return _matrix(change)


MATRIX_EDITS: dict[str, tuple[Edit, str]] = {
    **NPZ_EDITS,
    "index outside": _at("indices", -1, 120, 10**6, -(2**31), 2**31 - 1),
    "pointer wrong": _at("indptr", -1, 10**6, 2**31 - 1, -(2**31)),
    "value no number": _at("data", np.nan, np.inf, -np.inf),
    "shape wrong": _put(
        "shape", [6], [6, 119], [7, 120], [120, 6], [-6, 120], [6, 2**62], [0, 0], [6, 120, 1], ["6", "120"]
    ),
    "format wrong": _put("format", b"csc", b"abc", b"", "csx", b"coo", b"bsr", b"dia", 5, [1, 2]),
    "pointer shorter": _matrix(lambda c, r: c.update(indptr=c["indptr"][:-1])),
    "pointer longer": _matrix(lambda c, r: c.update(indptr=np.append(c["indptr"], c["indptr"][-1]))),
    "data shorter": _matrix(lambda c, r: c.update(data=c["data"][:-1])),
    "indices of floats": _matrix(lambda c, r: c.update(indices=c["indices"] + 0.5)),
    "int64 indices": (arrays_edit(lambda c, r: c.update(indices=c["indices"].astype(np.int64))), "same"),
    "complex": _matrix(lambda c, r: c.update(data=c["data"] + 1j)),
}
IMAGES_EDITS: dict[str, tuple[Edit, str]] = {
    **NPZ_EDITS,
    "floats": _matrix(lambda c, r: c.update(train_images=c["train_images"].astype(float))),
    "a label too many": _matrix(lambda c, r: c.update(train_labels=np.append(c["train_labels"], 0))),
    "negative label": _matrix(lambda c, r: c.update(test_labels=c["test_labels"].astype(int) - 5)),
    "huge label": _matrix(lambda c, r: c.update(train_labels=c["train_labels"].astype(np.int64) + 2**40)),
    "no images": _matrix(lambda c, r: c.update(train_images=c["train_images"][:0],
    train_labels=c["train_labels"][:0])),
    "other size": _matrix(lambda c, r: c.update(test_images=c["test_images"][:, :5])),
    "five channels": _matrix(lambda c, r: c.update(train_images=np.repeat(c["train_images"], 5, 3))),
    "evil class names": (arrays_edit(lambda c,
    r: c.update(class_names=np.array([r.choice(EVIL_TEXT) for _ in range(3)]))), "any"),
    "objects": _matrix(lambda c, r: c.update(class_names=np.array([Evil()] * 3, dtype=object))),
}  # fmt: skip


# --- pictures


def eps(path: Path, rng: random.Random) -> None:
    """PostScript with the name of a PNG: Pillow would hand it to Ghostscript."""
    head = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    path.write_text(head + "(%pipe%touch CANARY) (w) file closefile\nshowpage\n%%EOF\n")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def picture_bomb(path: Path, rng: random.Random) -> None:
    """A PNG that says to have 10^10 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(3 << 20))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")
    )


def picture_format(path: Path, rng: random.Random) -> None:
    """A picture of another kind under the same name."""
    from PIL import Image

    picture = Image.open(path).convert(rng.choice(("RGB", "L", "1", "P", "CMYK", "RGBA", "I;16", "F")))
    for kind in rng.sample(
        ("GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "PCX", "TGA", "PDF", "PNG", "JPEG"), 11
    ):
        try:
            picture.save(path, kind)
        except (OSError, ValueError, KeyError, SystemError):
            continue
        return


PICTURE_EDITS: dict[str, tuple[Edit, str]] = {
    **bytes_edits("same", "same"),
    "EPS": (eps, "refuse"),
    "bomb": (picture_bomb, "refuse"),
    "another format": (picture_format, "any"),
    "empty": (lambda path, rng: path.write_bytes(b"") and None, "refuse"),
    "text": (lambda path, rng: path.write_text("hello") and None, "refuse"),
    "svg": (
        lambda path, rng: path.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>') and None,
        "refuse",
    ),
}


def more_files(path: Path, rng: random.Random) -> None:
    """Something odd beside the pictures."""
    folder = path.parent
    name = rng.choice(
        (
            "x.png",
            "a\nb.png",
            ".hidden.png",
            "é\u202e.png",
            "x.txt",
            "Thumbs.db",
            ".DS_Store",
            "x.PNG",
            "-rf.png",
            "x.eps",
            "x.pdf",
        )
    )
    kind = rng.randrange(5)
    if kind == 0:
        (folder / name).symlink_to("/dev/zero")
    elif kind == 1:
        os.mkfifo(folder / name)
    elif kind == 2:
        (folder / name).mkdir()
    elif kind == 3:
        (folder / name).write_bytes(b"x")
    else:
        (folder.parent / name).mkdir()


PICTURE_EDITS["more files"] = (more_files, "any")
PICTURE_EDITS["other"] = (other, "any")  # a folder in its place is a folder that has no pictures


# --- checkpoints


def tree_edit(change: Callable[[Any, random.Random], None]) -> Edit:
    """Make an edit of what is in a checkpoint, and write it as torch.save does."""

    def edit(path: Path, rng: random.Random) -> None:
        import torch

        content = torch.load(path, map_location="cpu", weights_only=True)
        change(content, rng)
        save(content, path)

    return edit


def save(content: Any, path: Path) -> None:
    """Write a checkpoint with all the marks of one that the project wrote."""
    from sparsereg.archives import save_torch

    save_torch(path, content)


def places(node: Any, most: int = 20000) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything in nested dicts and lists."""
    found: list[tuple[Any, Any]] = []
    waiting = [node]
    while waiting and len(found) < most:
        here = waiting.pop()
        for key in list(here) if isinstance(here, dict) else range(len(here)):
            found.append((here, key))
            if isinstance(here[key], dict | list):
                waiting.append(here[key])
    return found


def _evil_values(content: Any, rng: random.Random) -> None:
    import torch

    for _ in range(rng.choice((1, 1, 1, 3))):
        place, key = rng.choice(places(content))
        old = place[key]
        value = rng.choice(EVIL_VALUES)
        if isinstance(old, torch.Tensor) and rng.random() < 0.7:
            value = rng.choice((old[..., None], old.flatten()[:-1], old.to(torch.complex64), old.double(),
            torch.full_like(old, 2), old.to_sparse() if old.dim() else old + 1,
                                old.to(torch.int32), torch.empty(0), old.to("meta"),
                                torch.full(old.shape, float("nan"))))  # fmt: skip
        place[key] = value


def _drop_keys(content: Any, rng: random.Random) -> None:
    place, key = rng.choice(places(content))
    del place[key]


def _rename_keys(content: Any, rng: random.Random) -> None:
    dicts = [(place, key) for place, key in places(content) if isinstance(place, dict)]
    place, key = rng.choice(dicts)
    place[rng.choice((*EVIL_TEXT, 5, f"{key}x"))] = place.pop(key)


def _evil_config(content: Any, rng: random.Random) -> None:
    """Settings of the run that obey somebody else."""
    if isinstance(content.get("notes"), str):  # of a compacted network
        notes = json.loads(content["notes"])
        _evil_config(notes, rng)
        content["notes"] = json.dumps(notes)
        return None
    config = content.get("sparsereg", content).get("config")
    if not isinstance(config, dict):
        return _evil_values(content, rng)
    key, value = rng.choice((
        ("model", {"_target_": "os.system", "command": CANARY}),
        ("model", {"name": "lenet300", "_target_": "os.system"}),
        ("data", {"_target_": "os.system", "command": CANARY, "name": "digits"}),
        ("seed", "${oc.env:SPARSEREG_FUZZ_SECRET}"), ("lambda_l0", "${oc.env:SPARSEREG_FUZZ_SECRET}"),
        ("optimizer", "${oc.env:SPARSEREG_FUZZ_SECRET}"), ("model",
        {"name": "${oc.env:SPARSEREG_FUZZ_SECRET}"}),
        ("data", {"name": "npz", "path": "${oc.env:SPARSEREG_FUZZ_SECRET}"}),
        ("data", {"name": "npz", "path": "/dev/zero"}), ("trainer",
        {"profiler": "simple", "fast_dev_run": True}), ("callbacks", {"x": {"_target_": "os.system"}}),
        ("model", {"name": "lenet300; import os"}), ("temperature",
        {"schedule": "__import__('os').system('touch CANARY')"}), ("hydra", {"run": {"dir": "/"}}),
        ("ckpt_path", "/dev/zero"), ("distill", {"ckpt_path": "/dev/zero"}),
        ("logger", {"_target_": "os.system"}), ("model", {"source": "torchvision", "name": "resnet18",
        "weights": "/dev/zero"}), ("model", {"name": "../../x"}),
        ("trainer", {"strategy": "ddp", "devices": 2}), ("trainer", {"default_root_dir": "/"}),
    ))  # fmt: skip
    if isinstance(value, dict) and isinstance(config.get(key), dict) and rng.random() < 0.7:
        value = {**config[key], **value}
    config[key] = value
    return None


def evil_pickle(path: Path, rng: random.Random) -> None:
    """A file whose pickle runs a command, under the right names and checksums."""
    import torch

    kind = rng.randrange(3)
    if kind == 0:
        path.write_bytes(pickle.dumps({"state_dict": Evil()}))
        return
    if kind == 1:
        torch.save({"state_dict": Evil(), "sparsereg": {}}, path)
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, pickle.dumps(Evil(), 2) if member.endswith("data.pkl") else content)


def _json_inside(content: Any, rng: random.Random) -> None:
    """Change the description of a network, which is JSON in a string."""
    texts = [(p, k) for p, k in places(content) if isinstance(p[k], str) and p[k][:2] in ('{"', "[{", '[["')]
    if not texts:
        return _evil_values(content, rng)
    place, key = rng.choice(texts)
    tree = json.loads(place[key])
    for _ in range(rng.choice((1, 1, 2))):
        inner, name = rng.choice(places(tree))
        kind = rng.random()
        if kind < 0.6:
            inner[name] = rng.choice(EVIL_VALUES)
        elif kind < 0.8:
            del inner[name]
        elif isinstance(inner, dict):
            inner[rng.choice(EVIL_TEXT)] = inner.pop(name)
        else:
            inner.append(inner[name])
    place[key] = json.dumps(tree)
    return None


CHECKPOINT_EDITS: dict[str, tuple[Edit, str]] = {
    **bytes_edits("refuse", "refuse"),
    "evil values": (tree_edit(_evil_values), "any"),
    "evil values again": (tree_edit(_evil_values), "any"),
    "parts are missing": (tree_edit(_drop_keys), "any"),
    "other names": (tree_edit(_rename_keys), "any"),
    "evil settings": (tree_edit(_evil_config), "any"),
    "evil settings again": (tree_edit(_evil_config), "any"),
    "evil pickle": (evil_pickle, "refuse"),
    "evil member": (evil_member, "same"),
    "evil description": (tree_edit(_json_inside), "any"),
    "a member twice": (member_twice, "refuse"),
}


# --- text


def yaml_text(path: Path, rng: random.Random) -> None:
    """An experiment that is not what it should be."""
    head = "# @package _global_\n"
    path.write_bytes(rng.choice((
        b"", b"5\n", b"[]\n", b"abc\n", b"\x00\xff", "lambda_l0: é\n".encode("latin-1"), b"\tlambda_l0: 1\n",
        (head + "lambda_l0: !!python/object/apply:os.system ['touch CANARY']\n").encode(),
        (head + "lambda_l0: !!python/name:os.system\n").encode(),
        (head + "lambda_l0: 1\nlambda_l0: 2\n").encode(),
        (head + "model: {_target_: os.system, command: touch CANARY}\n").encode(),
        (head + "nokey: 1\n").encode(), (head + "lambda_l0: abc\n").encode(),
        (head + "lambda_l0: [1\n").encode(), (head + "optimizer: 5\n").encode(),
        (head + "trainer: null\n").encode(),
        (head + "defaults: 5\n").encode(), (head + "defaults:\n  - override /model: nope\n").encode(),
        (head + "defaults:\n  - override /nope: x\n").encode(), (head + "defaults:\n  - nope\n").encode(),
        (head + "defaults:\n  - own\n").encode(),
        (head + "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nlambda_l0: *c\n").encode(),
        (head + "lambda_l0: ${nokey}\n").encode(), (head + "lambda_l0: ${lambda_l0}\n").encode(),
        (head + "? [a]\n: 1\n").encode(), (head + "5: 1\n").encode(),
        b"# @package ../x\nlambda_l0: 1\n", b"# @package nope\nlambda_l0: 1\n",
        (head + "hydra: 5\n").encode(), (head + "hydra: {mode: nope}\n").encode(),
        (head + "{" * 3000).encode(), (head + "a: " + "x" * 10**6 + "\n").encode(),
        (head + "---\nlambda_l0: 1\n---\nlambda_l0: 2\n").encode(), (head + "lambda_l0: .nan\n").encode(),
        (head + "seed: 2020-01-01\n").encode(), (head + "lambda_l0: 1:30\n").encode(),
    )))  # fmt: skip


def json_tree(path: Path, rng: random.Random) -> None:
    """A JSON file with odd values."""
    tree = json.loads(path.read_text())
    for _ in range(rng.choice((1, 3))):
        place, key = rng.choice(places(tree))
        place[key] = rng.choice(EVIL_VALUES)
    path.write_text(json.dumps(tree))


def evil_parquet(path: Path, rng: random.Random) -> None:
    """A parquet file with other columns, types and notes."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pd.read_parquet(path)
    name = rng.choice(list(table.columns))
    kind = rng.randrange(9)
    if kind == 0:
        table = table.drop(columns=name)
    elif kind == 1:
        table[name] = [[1, 2]] * len(table)
    elif kind == 2:
        table[name] = pd.to_datetime("2020-01-01")
    elif kind == 3:
        table[name] = None
    elif kind == 4:
        table = table.iloc[:0]
    elif kind == 5:
        table[name] = b"\xff"
    elif kind == 6:
        table[name] = rng.choice(EVIL_TEXT[:20]).replace("\x00", "")
    elif kind == 7:
        table[name] = pd.Categorical([str(v) for v in table[name]])
    made = pa.Table.from_pandas(table, preserve_index=False)
    if kind == 8:
        made = made.replace_schema_metadata(
            {b"pandas": rng.choice((b"{", b"[]", b'{"columns": 5}', pickle.dumps(Evil())))}
        )
    pq.write_table(made, path)


# --- the targets


def targets(folder: Path) -> list[Target]:
    """Return every file of the base that a command reads."""
    households = ("calibrate", tuple(base.HOUSEHOLDS))
    parquet = (
        "calibrate",
        tuple("problem.households=H.parquet" if "H.csv" in a else a for a in base.HOUSEHOLDS),
    )
    matrix = ("calibrate", tuple(base.MATRIX))
    arrays = (
        "train",
        (
            *[a for a in base.TRAIN if not a.startswith("data.image") and a != "data=digits"],
            "data=npz",
            "data.path=images.npz",
        ),
    )
    pictures = (
        "train",
        (*[a for a in base.TRAIN if a != "data=digits"], "data=image_folder", "data.root=pictures"),
    )
    resumed = tuple(a for a in base.TRAIN if not a.startswith("trainer.max_epochs"))

    def of(ckpt: Path) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return (
            ("test", (f"ckpt_path={ckpt}", *base.TEST)),
            ("test", (f"ckpt_path={ckpt}", *base.TEST)),
            ("test", (f"ckpt_path={ckpt.parents[1]}", *base.TEST)),
            ("train", (f"ckpt_path={ckpt}", *base.FAST)),
            ("train", (*resumed, f"ckpt_path={ckpt}", "resume_training=true", "trainer.max_epochs=2")),
            ("train", (*base.TRAIN, f"distill.ckpt_path={ckpt}")),
        )

    small = base.compacted(folder)
    tuned = [p.relative_to(folder) for p in (folder / base.TUNED).parents[1].rglob("last.ckpt")]
    tuned = [p for p in tuned if p != base.TUNED]
    experiment = ("train", ("--config-dir", "mine", "experiment=own", *base.FAST, "data.image_size=8"))
    yaml = {
        **bytes_edits("any", "any"),
        "yaml": (yaml_text, "any"),
        "yaml again": (yaml_text, "any"),
        "yaml once more": (yaml_text, "any"),
    }
    run = base.GATED.parents[1]
    of_run = (("test", (f"ckpt_path={run}", *base.TEST)), ("train", (f"ckpt_path={run}", *base.FAST)))
    texts = {**bytes_edits("any", "any"), "json": (json_tree, "any")}
    texts["other"] = (other, "any")
    found = [
        Target("H.csv", (households,), {**bytes_edits("any", "any"),
        **table_edits(("w", "age", "x"), ("id", "w", "age", "area", "x")),
                                        "id twice": (rows_edit(lambda rows,
                                        r: _some_row(rows[:-1], r).__setitem__(0, rows[-1][0])), "refuse"),
                                        "negative weight": (set_cell("w", ("-1", "-0.001")), "refuse")}),
        Target("T.csv", (households,), {**bytes_edits("any", "any"),
        **table_edits(("value",), ("name", "value")),
                                        "condition": (set_cell("where", WRONG_CONDITIONS), "refuse"),
                                        "condition again": (set_cell("where", WRONG_CONDITIONS), "refuse"),
                                        "measure": (set_cell("measure",
                                        ("area", "id", "nokey", "__class__", "x+1")), "refuse")}),
        Target("H.parquet", (parquet,), {**bytes_edits("any", "any"), "evil": (evil_parquet, "any"),
        "evil again": (evil_parquet, "any")}),
        Target("M.npz", (matrix,), MATRIX_EDITS),
        Target("TM.csv", (matrix,), {**bytes_edits("any", "any"),
        **table_edits(("value",), ("name", "value"))}),
        Target("W.csv", (matrix,), {**bytes_edits("any", "any"), **table_edits(("weight",), ("weight",))}),
        Target("images.npz", (arrays,), IMAGES_EDITS),
        Target("pictures/train/cat/0.png", (pictures,), PICTURE_EDITS),
        Target("pictures/test/dog/1.jpg", (pictures,), {**PICTURE_EDITS, **bytes_edits("any", "any")}),
        Target(str(base.GATED), of(base.GATED), CHECKPOINT_EDITS),
        Target(str(base.GATED), of(base.GATED), CHECKPOINT_EDITS),
        Target(str(small), (("test", (f"ckpt_path={small}", *base.TEST)),
        ("train", (f"ckpt_path={small}", "without_using_gate=true", *base.FAST)),
                            ("train", (*base.TRAIN, f"distill.ckpt_path={small}"))), CHECKPOINT_EDITS),
        Target(str(base.INTERRUPTED), (("calibrate", (*base.CALIBRATION, f"ckpt_path={base.INTERRUPTED}")),),
        {**CHECKPOINT_EDITS}),
        Target("mine/experiment/own.yaml", (experiment,), yaml),
        Target(str(run / "results.json"), of_run, texts),
        Target(str(run / "config.yaml"), of_run, {**bytes_edits("any", "any"), "other": (other, "any"),
        "yaml": (yaml_text, "any")}),
        Target(str(run / "split.npz"), of_run, {name: (edit, "any") for name,
        (edit, _) in NPZ_EDITS.items()}),
    ]  # fmt: skip
    for path in tuned:
        commands = (("test", (f"ckpt_path={path}", *base.TEST)),
        ("test", (f"ckpt_path={base.TUNED.parents[1]}", *base.TEST)),
                    ("train", (f"ckpt_path={path}", "without_using_gate=true", *base.FAST)))  # fmt: skip
        found += [Target(str(path), commands, CHECKPOINT_EDITS)]
    return found


_references: dict[tuple[str, tuple[str, ...]], object] = {}


def _reference(script: str, arguments: tuple[str, ...], made: Path) -> object:
    """Return what a command gives with the file as it was."""
    key = script, arguments
    if key not in _references:
        folder = made.parent / "reference"
        base.remove(folder)
        process.copy_tree(made, folder)
        outcome = process.run(script, list(arguments), folder)
        if outcome.code or outcome.results is None:
            raise RuntimeError(f"{process.command(script, list(arguments))}: {outcome.err}")
        _references[key] = signature(folder, outcome)
        base.remove(folder)
    return _references[key]


def signature(folder: Path, outcome: Outcome) -> object:
    """Return all numbers that a run gave."""
    assert outcome.results is not None
    results = folder / outcome.results
    weights = results.parent / "weights.csv"
    return base.numbers(results), weights.read_bytes() if weights.exists() else None


def _same(script: str, arguments: tuple[str, ...], made: Path, folder: Path, outcome: Outcome) -> list[str]:
    if outcome.code or outcome.results is None:
        return []
    equal = signature(folder, outcome) == _reference(script, arguments, made)
    return [] if equal else ["other numbers from a damaged file"]


def attacks(seed: int, numbers: "range | list[int]", made: Path) -> Iterator[Attack]:
    """Return attacks by files: the targets take turns, and the edits of each."""
    all_targets = targets(made)
    for number in numbers:
        rng = random.Random(f"files-{seed}-{number}")
        target = all_targets[number % len(all_targets)]
        names = list(target.edits)
        random.Random(f"{seed}-{target.path}").shuffle(names)
        name = names[(number // len(all_targets)) % len(names)]
        edit, must = target.edits[name]
        script, arguments = rng.choice(target.commands)
        expected = "refuse" if must == "refuse" else "any"
        case = Case(script, arguments, expected, f"{Path(target.path).name}: {name}")
        extra = partial(_same, script, arguments, made) if must == "same" else (lambda folder, outcome: [])
        yield Attack(f"files-{seed}-{number}", case, partial(_apply, target.path, edit, rng), extra)


def _apply(path: str, edit: Edit, rng: random.Random, folder: Path) -> None:
    file = folder / path
    before = file.read_bytes()
    edit(file, rng)
    for _ in range(20):
        if edit is more_files or not file.is_file() or file.is_symlink() or file.read_bytes() != before:
            return
        edit(file, rng)  # it happened to change nothing
