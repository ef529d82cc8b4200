"""Could torch-pruning do the compaction? Its answers against the gated network's, on five networks.

    pip install torch-pruning==1.6.1
    python -m benchmarks.compaction_torch_pruning

Gates are folded into BatchNorm, then torch-pruning removes the closed channels of every BatchNorm. Printed
is the largest difference of the outputs as a share of their spread, for torch-pruning and for
``sparsereg.compression.compact``.
"""

import copy

import torch
import torchvision
from torch import Tensor, nn

from sparsereg.compression import compact, gate
from sparsereg.compression.verify import difference
from sparsereg.model.basic_l0_blocks import GatedBatchNorm2d, L0Gate
from sparsereg.model.googlenet import GoogleNet
from sparsereg.penalties import hard_concretes


@torch.no_grad()
def prepared(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random gates, and BatchNorm as it might be after training."""
    for g in hard_concretes(net).values():
        g.log_alpha.copy_(torch.randn(g.log_alpha.shape, generator=generator) * 3)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.bias.copy_(torch.randn(m.bias.shape, generator=generator) * 0.3)
    return net.eval()


def each_its_own(net: nn.Module) -> nn.Module:
    """A gate of its own behind every BatchNorm, also before additions and depthwise convolutions."""
    for name, norm in list(net.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            net.set_submodule(name, GatedBatchNorm2d(norm.num_features, L0Gate(norm.num_features)))
    return net


def folded(net: nn.Module) -> tuple[nn.Module, dict[str, list[int]]]:
    """The network with plain BatchNorm, and the closed channels of each."""
    plain, closed = copy.deepcopy(net), {}
    for name, norm in list(net.named_modules()):
        if isinstance(norm, GatedBatchNorm2d):
            z = norm.gate.gates.median().detach()
            made = nn.BatchNorm2d(norm.num_features, norm.eps)
            made.load_state_dict({k: v for k, v in norm.state_dict().items() if not k.startswith("gate.")})
            made.weight.data *= z
            made.bias.data *= z
            plain.set_submodule(name, made)
            closed[name] = torch.nonzero(z == 0).flatten().tolist()
    return plain.eval(), closed


def with_torch_pruning(net: nn.Module, x: Tensor) -> nn.Module:
    """Remove the closed channels with torch-pruning, each layer unless a tied one took them along."""
    import torch_pruning

    plain, closed = folded(net)
    sizes = {name: plain.get_submodule(name).num_features for name in closed}
    graph = torch_pruning.DependencyGraph().build_dependency(plain, example_inputs=x)
    for name, channels in closed.items():
        norm = plain.get_submodule(name)
        if channels and norm.num_features == sizes[name]:
            group = graph.get_pruning_group(norm, torch_pruning.prune_batchnorm_out_channels, idxs=channels)
            if graph.check_pruning_group(group):
                group.prune()
    return plain


def main() -> None:
    """Print one line for each network."""
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    resnet, mobilenet = torchvision.models.resnet18, torchvision.models.mobilenet_v2
    networks = {
        "GoogleNet": GoogleNet(gate="all"),
        "resnet18 by gate()": gate(resnet(num_classes=10).eval(), x),
        "mobilenet_v2 by gate()": gate(mobilenet(num_classes=10).eval(), x),
        "resnet18, each layer its own gate": each_its_own(resnet(num_classes=10)),
        "mobilenet_v2, each layer its own gate": each_its_own(mobilenet(num_classes=10)),
    }
    print(f"{'network':40s}{'torch-pruning':>15s}{'compact':>12s}")
    for name, made in networks.items():
        net = prepared(made, torch.Generator().manual_seed(0))
        wanted, theirs, ours = net(x), with_torch_pruning(net, x)(x), compact(net, x)(x)
        print(f"{name:40s}{difference(wanted, theirs):15.1e}{difference(wanted, ours):12.1e}")


if __name__ == "__main__":
    main()
