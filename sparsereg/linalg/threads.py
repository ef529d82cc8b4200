"""One pool of threads for compiled loops, and for whatever else releases the interpreter's lock."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

_threads: ContextVar[int | None] = ContextVar("threads", default=None)


def num_threads() -> int:
    """How many threads compiled loops may use: as many as torch may, or might before ``quiet_threads``."""
    return _threads.get() or torch.get_num_threads()


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Give torch's threads to the compiled loops for a while; torch itself and BLAS compute in one.

    Their threads spin while they wait for each other, which costs many times what they save on vectors and
    triangles of this size: with two threads of BLAS a calibration to K households took twice as long
    (``python -m benchmarks.calibration calls``).
    """
    number = torch.get_num_threads()
    token = _threads.set(num_threads())
    torch.set_num_threads(1)
    try:
        with _one_thread_of_blas():
            yield
    finally:
        torch.set_num_threads(number)
        _threads.reset(token)


@functools.cache
def _blas() -> Any:
    """The BLAS libraries of this process; None where threadpoolctl is not installed."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()


def _one_thread_of_blas() -> AbstractContextManager[Any]:
    found = _blas()
    return nullcontext() if found is None else found.limit(limits=1, user_api="blas")


def in_turns(work: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Call a function with each of these arguments, in threads that take what is next; results in order.

    The caller works too, so that calls from within calls never wait for a free thread.

    Args:
        work: What to call. Its results must not depend on who calls it, or when.
        calls: Arguments of each call.

    Raises:
        Exception: what a call raised.
    """
    numbered = list(enumerate(calls))
    if len(numbered) == 1:
        return [work(*numbered[0][1])]
    results: list[Any] = [None] * len(numbered)
    todo = iter(numbered)

    def take_turns() -> None:
        for place, arguments in todo:
            results[place] = work(*arguments)

    helpers = min(num_threads(), len(numbered)) - 1
    futures = [_pool(os.getpid(), helpers).submit(take_turns) for _ in range(helpers)]
    try:
        take_turns()
    finally:
        # On a busy machine a helper may not have had its turn; then there is nothing to wait for.
        waited = [future for future in futures if not future.cancel()]
    for future in waited:
        future.result()
    return results


def in_turn_by_turn(work: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """``in_turns`` for some calls at a time: results come in order, and need not all be kept.

    Arguments are made, and calls worked on, with ``quiet_threads``.

    Args:
        work: What to call.
        calls: Arguments of each call, asked for when they are needed.
    """
    ahead = iter(calls)
    while True:
        with quiet_threads():
            results = in_turns(work, itertools.islice(ahead, 4 * num_threads()))
        if not results:
            return
        yield from results


@functools.lru_cache(maxsize=4)
def _pool(process: int, helpers: int) -> ThreadPoolExecutor:
    """Threads of this process (a fork must not wait for its parent's) that sleep while nothing is to do."""
    return ThreadPoolExecutor(helpers, thread_name_prefix="sparsereg")
