"""A stranger's U-Net: half of its operations go, and a run that was killed goes on bitwise."""

import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from examples import segmentation_unet as example
from sparsereg.compression import load_compacted
from tests.states import assert_same

SIZES = {"epochs": 4, "images": 64, "width": 8}
RUN = f"""
import sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
from examples import segmentation_unet
print(segmentation_unet.main(Path(sys.argv[1]), **{SIZES}))
"""


@pytest.fixture(autouse=True)
def _lightning_in_tests():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        yield


def started(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_killed_run_goes_on_bitwise_and_half_the_operations_go(tmp_path):
    reached = example.main(tmp_path / "whole", **SIZES)
    assert 0.48 <= reached["macs_left"] <= 0.5
    process = started(tmp_path / "killed")
    last = tmp_path / "killed" / "last.ckpt"
    while process.poll() is None and not last.is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert torch.load(last, weights_only=True)["epoch"] < SIZES["epochs"] - 1
    done = started(tmp_path / "killed")
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert out.strip() == str(reached)
    folders = (tmp_path / "whole", tmp_path / "killed")
    whole, resumed = (torch.load(folder / "last.ckpt", weights_only=True) for folder in folders)
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    assert any("log_alpha" in name for name in whole["state_dict"])
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    assert_same(whole["optimizer_states"], resumed["optimizer_states"])
    assert_same(whole["callbacks"]["Sparsify"], resumed["callbacks"]["Sparsify"])
    a, b = (load_compacted(folder / "compacted.pt") for folder in folders)
    images = example.shapes(4, 7).tensors[0]
    assert torch.equal(a(images), b(images))
