"""The line that a user sees when a network starts to train, or to be tested."""

from typing import Any

import torch
from torch import nn

from sparsereg.data.own import RunData
from sparsereg.penalties import hard_concretes


def start_line(name: str, net: nn.Module, data: RunData, device: torch.device, folder: Any) -> str:
    """Say in one line what is about to happen: network, parameters, gates, data, device, folder.

    Args:
        name: of the network.
        net: the network.
        data: loaded.
        device: that it runs on.
        folder: that the run writes into.
    """
    gates = hard_concretes(net)
    where = f"{sum(gate.log_alpha.numel() for gate in gates.values()):,} gates" if gates else "no gates"
    own = {id(gate.log_alpha) for gate in gates.values()}
    parameters = sum(p.numel() for p in net.parameters() if id(p) not in own)
    if device.type == "cuda":
        at = f"{device} ({torch.cuda.get_device_name(device)})"
    else:
        at = f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
    source = data.describe()["source"]
    return f"{name}: {parameters:,} parameters, {where}; data {source}; on {at}; files in {folder}"
