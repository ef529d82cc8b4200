"""Networks to compact, and random gate patterns for them."""

import copy

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from sparsereg.compression import Accountant, gate
from sparsereg.distributions import log_alpha_at
from sparsereg.layers import L0Conv2d, L0DepthwiseConv2d, L0Linear
from sparsereg.model.basic_l0_blocks import L0Gate
from sparsereg.model.googlenet import GoogleNet
from sparsereg.model.lenet import LeNet5, LeNet300
from sparsereg.model.sparse_mlp import SparseMLP
from sparsereg.penalties import hard_concretes
from sparsereg.zoo.torchvision import FAMILIES


class Functional(nn.Module):
    """Functions instead of modules, views with sizes, gates in odd places, a gate used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.input_gate = L0Gate(3)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.gate = L0Gate(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.gate3 = L0Gate(6)
        self.slopes = nn.PReLU(6)
        self.units = L0Gate(6 * 16)
        self.fc = nn.Linear(6 * 16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_gate(x)
        y = self.gate(F.gelu(self.conv1(x)))
        z = self.norm(self.conv2(y))
        y += 0.5 * self.gate(torch.tanh(z)) - 0.1 * y
        y = F.dropout(F.relu_(y), 0.3, self.training)
        y = self.gate3(self.slopes(self.up(y)))
        b, c, _, _ = y.shape
        y = F.adaptive_avg_pool2d(y, 4).view(b, c * 16)
        return self.fc(self.units(y))


class Residual(nn.Module):
    """A residual sum with a dead branch, and a product with excitations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.inner = nn.Conv2d(8, 4, 3, padding=1)
        self.inner_gate = L0Gate(4)
        self.outer = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.gate = L0Gate(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.norm(self.outer(self.inner_gate(F.relu(self.inner(x))))))
        x = self.gate(x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True))))
        return F.log_softmax(self.head(x.amax((2, 3))), 1)


class Grouped(nn.Module):
    """Grouped convolutions whose groups must stay equally large, and padding behind a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.gate = L0Gate(12)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.norm = nn.BatchNorm2d(12)
        self.wide = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.gate2 = L0Gate(24)
        self.last = nn.Conv2d(24, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(torch.sigmoid(self.conv(x)))
        x = torch.sigmoid(self.norm(self.grouped(x)))
        x = F.avg_pool2d(self.gate2(self.wide(x)), 3, stride=1, padding=1)
        return self.last(x).flatten(1)


def dense() -> nn.Module:
    """BatchNorm over concatenations."""
    return torchvision.models.DenseNet(4, (2, 2), 8, num_classes=5)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        L0Gate(3 * 8 * 8),
        nn.Linear(3 * 8 * 8, 30),
        nn.ReLU(),
        L0Gate(30),
        nn.Linear(30, 20),
        nn.BatchNorm1d(20),
        nn.Tanh(),
        L0Gate(20),
        nn.Dropout(),
        nn.Linear(20, 10),
    )


def layers() -> nn.Module:
    return nn.Sequential(
        L0Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        L0Conv2d(8, 6, 3, structured=True, bias=False),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        L0DepthwiseConv2d(6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        L0Linear(6 * 6 * 6, 4),
    )


def gated(network: nn.Module, families: tuple[str, ...] | None = None) -> nn.Module:
    return gate(network, torch.zeros(1, 3, 32, 32), families=families)


RGB8, RGB32 = (3, 8, 8), (3, 32, 32)
NETWORKS = {
    "googlenet": (lambda: GoogleNet(gate="all"), RGB8),
    "googlenet, branches": (GoogleNet, RGB8),
    "googlenet, gelu": (lambda: GoogleNet(gate="all", act="gelu"), RGB8),
    "lenet300": (lambda: LeNet300(image_shape=RGB8), RGB8),
    "lenet5": (lambda: LeNet5(image_shape=RGB8), RGB8),
    "sparse_mlp": (lambda: SparseMLP(image_shape=RGB8, hidden_sizes=(20, 10)), RGB8),
    "mlp": (mlp, RGB8),
    "layers": (layers, RGB8),
    "functional": (Functional, RGB8),
    "residual": (Residual, RGB8),
    "grouped": (Grouped, RGB8),
    "resnet18": (lambda: gated(torchvision.models.resnet18(num_classes=5)), RGB32),
    "mobilenet_v2": (lambda: gated(torchvision.models.mobilenet_v2(num_classes=5)), RGB32),
    "mobilenet_v3": (lambda: gated(torchvision.models.mobilenet_v3_small(num_classes=5)), RGB32),
    "densenet": (lambda: gated(dense()), RGB32),
}
"""Name to builder and image shape."""
ONE_KIND = {
    "resnet18": (lambda: gated(torchvision.models.resnet18(num_classes=5), FAMILIES), RGB32),
    "mobilenet_v2": (lambda: gated(torchvision.models.mobilenet_v2(num_classes=5), FAMILIES), RGB32),
    "mobilenet_v3": (lambda: gated(torchvision.models.mobilenet_v3_small(num_classes=5), FAMILIES), RGB32),
}
"""The same with gates of one kind on each layer, so that channels can leave while they train."""


_BUILT: dict[tuple[str, bool], nn.Module] = {}


def make(name: str, seed: int = 0, batch: int = 3, one_kind: bool = False) -> tuple[nn.Module, Tensor]:
    """A network in eval mode with statistics that BatchNorm might have learnt, and a batch.

    It is a copy of one that was built and traced once: copies keep what is known of the network. Weights of
    another seed are the same ones in another order.
    """
    builder, shape = (NETWORKS | ONE_KIND if one_kind else NETWORKS)[name]
    with torch.random.fork_rng():
        if (name, one_kind) not in _BUILT:
            torch.manual_seed(0)
            _BUILT[name, one_kind] = builder().eval()
            Accountant(_BUILT[name, one_kind], torch.zeros(1, *shape))
        network = copy.deepcopy(_BUILT[name, one_kind])
        torch.manual_seed(seed)
        for p in network.parameters():
            p.data = p.data.flatten()[torch.randperm(p.numel())].view_as(p)
        for m in network.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
                m.weight.data.uniform_(0.5, 1.5)
                m.bias.data.normal_(0, 0.3)
        return network, torch.randn(batch, *shape)


PATTERNS = ("mixed", "few open", "one open", "one layer shut", "all open", "all shut", "half")


@torch.no_grad()
def set_gates(network: nn.Module, pattern: str, seed: int = 0) -> None:
    """Set every log_alpha by a pattern; open gates are partly open except in 'all open' and 'half'."""
    generator = torch.Generator().manual_seed(seed)
    gates = list(hard_concretes(network).values())
    for i, g in enumerate(gates):
        p = torch.rand(g.log_alpha.shape, generator=generator).clamp(0.02, 0.98)
        if pattern == "few open":
            p = p**4
        elif pattern == "one open":
            p = torch.full_like(p, 0.1)
            p.view(-1)[int(torch.randint(p.numel(), (), generator=generator))] = 0.8
        elif pattern == "one layer shut" and i == seed % len(gates):
            p = torch.full_like(p, 0.1)
        elif pattern == "all open":
            p = torch.full_like(p, 1 - 1e-9)
        elif pattern == "all shut":
            p = torch.full_like(p, 0.1)
        elif pattern == "half":
            p = torch.where(p > 0.5, 1 - 1e-9, 1e-9)
        g.log_alpha.copy_(log_alpha_at(p.double(), g.temperature, g.gamma, g.zeta))
