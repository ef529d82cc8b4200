"""calibrate.py as one of a group of processes that torchrun or a batch system started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from sparsereg.device import several_processes
from sparsereg.errors import InputError, wrong_input
from sparsereg.files import new_version

T = TypeVar("T")


def in_processes() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def group() -> Iterator[None]:
    """Join the others, and leave them at the end."""
    from lightning_fabric import Fabric

    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    fabric = Fabric(
        accelerator="cpu", strategy="ddp", devices=here, num_nodes=int(os.environ["WORLD_SIZE"]) // here
    )
    fabric.launch()
    try:
        yield
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """Which one this is, from 0, and how many there are; 0 and 1 without a group."""
    return (dist.get_rank(), dist.get_world_size()) if several_processes() else (0, 1)


def together(work: Callable[[], T], alone: bool = True) -> T:
    """Do something in every process; if it is wrong input in one of them, the first process says so.

    Args:
        work: What is done.
        alone: Whether one process may fail while others do not.

    Raises:
        InputError: in the first process; the others leave with its exit code.
    """
    error: str | None = None
    try:
        with wrong_input():
            return_value = work()
    except InputError as wrong:
        error = str(wrong)
    said: list[Any] = [error]
    if alone and several_processes():
        said = [None] * dist.get_world_size()
        dist.all_gather_object(said, error)
    first = next((text for text in said if text is not None), None)
    if first is None:
        return return_value
    if place()[0] == 0:
        raise InputError(first)
    raise SystemExit(2)


def new_folder(outputs: Path) -> Path:
    """The folder of a new run, the same for all, made by the first."""
    paths: list[Any] = [new_version(outputs) if place()[0] == 0 else None]
    if several_processes():
        dist.broadcast_object_list(paths, 0)
    return Path(paths[0])


def wait() -> None:
    """Go on when all are here."""
    if several_processes():
        dist.barrier()
