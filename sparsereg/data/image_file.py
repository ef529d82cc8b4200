"""One image file of a stranger: what is opened, which formats are tried, how it is decoded."""

import os
import stat
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sparsereg.errors import InputError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, whatever a file is called. All are decoded in this process. Others Pillow hands to another
program: EPS to Ghostscript, which runs what is in the file."""
MAX_BYTES = 2**29
"""Largest file that is read (512 MiB)."""
MAX_PIXELS = 100_000_000
"""Largest image that is decoded: a small file can claim any size."""
MODES = {1: "L", 3: "RGB"}
"""Pillow's pixel format for a number of channels."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_file(path: Path, root: Path) -> None:
    """Check, without opening it, that a path is a file of bearable size that may be read.

    Args:
        path: the file, or a symbolic link to one.
        root: the resolved folder that links may not leave.

    Raises:
        InputError: it is something else; names it.
    """
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            status = _target(path, root).stat()
    except OSError as error:
        raise InputError(f"{path}: this file cannot be read ({error.strerror})") from error
    _check_status(path, status)
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: this file cannot be read (permission denied)")


def _target(path: Path, root: Path) -> Path:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python < 3.13 raises a RuntimeError for links in a circle
        raise InputError(f"{path}: this link leads nowhere; take it out of data.root") from error
    if not target.is_relative_to(root):
        raise InputError(f"{path}: this link leads out of data.root, to {target}; put the file itself there")
    return target


def _check_status(path: Path, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        what = _KINDS.get(kind, "no regular file")
        raise InputError(f"{path}: this is {what}, expected an image file; take it out of data.root")
    if status.st_size > MAX_BYTES:
        size, most = status.st_size / 2**20, MAX_BYTES // 2**20
        raise InputError(f"{path}: this file has {size:,.0f} MiB, an image at most {most}; scale it down")


def _open(path: Path) -> BinaryIO:
    """Open a file without waiting, in case that it has become a pipe since it was listed."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except OSError as error:
        raise InputError(f"{path}: this file cannot be read ({error.strerror})") from error
    try:
        _check_status(path, os.fstat(file.fileno()))
    except InputError:
        file.close()
        raise
    return file


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Decode one file to uint8 (channels, height, width): see ``sparsereg.data.ImageFolder``.

    Raises:
        InputError: the file is not an image that can be read; names it.
    """
    channels, height, width = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's hints about odd files; what counts is that they decode
            with _open(path) as file, Image.open(file, formats=FORMATS) as opened:
                _check_header(path, opened)
                upright = ImageOps.exif_transpose(opened)
                # Through RGBA, since Pillow drops a palette's transparency otherwise with made-up colours.
                if "transparency" in upright.info:
                    upright = upright.convert("RGBA")
                colours = upright.convert(MODES[channels])
                exact = ImageOps.fit(colours, (width, height), Image.Resampling.BILINEAR)
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: this image cannot be read (its content is none of {', '.join(FORMATS)})"
        ) from error
    except Exception as error:  # Pillow's decoders raise whatever their format's parser does
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: this image cannot be read ({reason[:200]})") from error
    pixels = np.array(exact, dtype=np.uint8).reshape(height, width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _check_header(path: Path, opened: Image.Image) -> None:
    """Check what the header says, before anything is decoded."""
    if opened.width * opened.height > MAX_PIXELS:
        raise _too_large(path)
    if opened.mode.startswith(("I", "F")):
        raise InputError(f"{path}: this image has more than 8 bits per channel; convert it first")


def _too_large(path: Path) -> InputError:
    return InputError(f"{path}: this image has more than {MAX_PIXELS:,} pixels; scale it down first")
