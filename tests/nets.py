"""Networks that the tests of the library share."""

import torch
from torch import nn

from sparsereg.layers import L0Conv2d, L0DepthwiseConv2d, L0Linear, SparseMLP
from sparsereg.model.googlenet import GoogleNet
from sparsereg.model.lenet import LeNet5, LeNet300
from sparsereg.model.sparse_mlp import SparseMLP as ImageMLP
from sparsereg.penalties import hard_concretes

NETS = {
    "linear": lambda: L0Linear(12, 5),
    "no_bias": lambda: L0Linear(12, 5, bias=False),
    "conv": lambda: L0Conv2d(1, 6, 3, padding=1),
    "structured": lambda: L0Conv2d(1, 6, (3, 5), stride=2, structured=True),
    "structured_no_bias": lambda: L0Conv2d(1, 6, 3, bias=False, structured=True),
    "depthwise": lambda: L0DepthwiseConv2d(5, 3, padding=1),
    "nested": lambda: nn.Sequential(
        L0Conv2d(1, 6, 3, structured=True),
        nn.ReLU(),
        nn.Sequential(L0DepthwiseConv2d(6, 3), nn.Sequential(L0Conv2d(6, 4, 3, bias=False))),
        nn.Flatten(),
        L0Linear(4 * 22 * 22, 7),
    ),
    "mlp": lambda: SparseMLP(784, 20, 10),
    "image_mlp": lambda: ImageMLP(hidden_sizes=(30, 20)),
    "lenet300": LeNet300,
    "lenet5": LeNet5,
    "googlenet": lambda: GoogleNet(10, 1, gate="all"),
}
LAYERS = ("linear", "no_bias", "conv", "structured", "structured_no_bias", "depthwise", "nested", "mlp")


def make(name: str, seed: int = 0) -> nn.Module:
    """A network whose gates are spread from shut to open."""
    generator = torch.Generator().manual_seed(seed)
    net = NETS[name]()
    with torch.no_grad():
        for gate in hard_concretes(net).values():
            gate.log_alpha.copy_(-0.6 + 2 * torch.randn(gate.gate_size, generator=generator))
    return net


def inputs(name: str, batch: int = 3) -> torch.Tensor:
    shape = {"linear": (12,), "no_bias": (12,), "depthwise": (5, 28, 28)}.get(name, (1, 28, 28))
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))
