"""What holds for all tests."""

import logging
import os
import random
import signal
from collections.abc import Iterator

import jaxtyping
import pytest

from tests.arrays import CHECKED

jaxtyping.install_import_hook(CHECKED, "tests.arrays.check_arrays")

# A shell that starts the tests in the background, or nohup, ignores these signals for them and for all that
# they start: what the tests start is to meet them as at a terminal.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


SAMPLE = os.environ.get("SAMPLE", "0")
"""Which of the costly tests run with those that are not slow: another word, another sixth of them."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let five of six costly tests be slow ones."""
    for item in items:
        drawn = random.Random(f"{SAMPLE} {item.nodeid}").random() < 1 / 6
        if item.get_closest_marker("costly") and not drawn:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_logger_writes_to_the_stream_of_an_earlier_test() -> Iterator[None]:
    """Take away what a command, run within a test, has put on the root logger: its stream is closed then."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)


@pytest.fixture
def unchecked_arrays() -> Iterator[None]:
    """Leave the shapes of arrays unchecked: PyTorch's tracers cannot look into the checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
