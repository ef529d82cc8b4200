"""Where to compute: the device, if what was asked for is not there, and whether others compute, too."""

import warnings

import torch
import torch.distributed as dist


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device, or with a warning the CPU where CUDA was asked for and there is none.

    Programs that were written on a machine with a GPU name it in the code; they shall run elsewhere.

    Args:
        device: a device or its name.
    """
    wanted = torch.device(device)
    if wanted.type == "cuda" and not torch.cuda.is_available():
        message = f"device {str(wanted)!r} was asked for, but there is no CUDA: using the CPU"
        warnings.warn(message, stacklevel=3)
        return torch.device("cpu")
    return wanted


def several_processes() -> bool:
    """Whether this process is one of a group that works together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
