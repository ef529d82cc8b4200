import copy
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from sparsereg.compression import compact, count, gate, is_compacted, load_compacted, save_compacted
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes
from tests.compression.networks import NETWORKS, make, set_gates


@pytest.mark.costly
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name, tmp_path):
    network, x = make(name)
    set_gates(network, "mixed")
    smaller = compact(network, x, check=False)
    path = save_compacted(smaller, tmp_path / "c.pt", {"classes": ["a", "b"]})
    loaded = load_compacted(path)
    assert torch.equal(loaded(x), smaller(x))
    assert type(loaded).__name__ == type(smaller).__name__
    assert loaded.meta["notes"] == {"classes": ["a", "b"]}
    assert loaded.state_dict().keys() == smaller.state_dict().keys()
    assert is_compacted(path)
    assert torch.load(path, weights_only=True)["version"] == 1
    save_compacted(loaded, path)
    assert torch.equal(load_compacted(path)(x), smaller(x))


@pytest.mark.costly
def test_keeps_the_size_of_the_first_network(tmp_path):
    network, x = make("googlenet")
    full = count(network, x)
    set_gates(network, "mixed")
    loaded = load_compacted(save_compacted(compact(network, x, check=False), tmp_path / "c.pt"))
    assert loaded.meta["original"] == {"parameters": full.parameters, "macs": full.macs}
    assert count(loaded, x).parameters < full.parameters
    again = compact(copy.deepcopy(loaded), x, check=False)
    assert again.meta["original"] == loaded.meta["original"]


def test_loaded_network_trains_and_frozen_weights_stay_frozen(tmp_path):
    network, x = make("googlenet")
    set_gates(network, "mixed")
    network.classifier.weight.requires_grad_(False)
    loaded = load_compacted(save_compacted(compact(network, x, check=False), tmp_path / "c.pt"))
    loaded.train()
    loaded(x).sum().backward()
    assert not loaded.classifier.weight.requires_grad
    assert loaded.classifier.bias.grad is not None


@pytest.mark.costly
def test_loads_where_only_pytorch_knows_how(tmp_path):
    """The structure is JSON and the weights are tensors: nothing of sparsereg is pickled."""
    network, x = make("residual")
    set_gates(network, "mixed")
    path = save_compacted(compact(network, x), tmp_path / "c.pt")
    code = (
        "import sys, torch, json; sys.modules['sparsereg'] = None;"
        f"c = torch.load({str(path)!r}, weights_only=True); print(json.loads(c['plan'])['name'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "CompactedResidual"


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        load_compacted(tmp_path / "none.pt")
    broken = tmp_path / "broken.pt"
    network, x = make("mlp")
    save_compacted(compact(network, x), broken)
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(InputError, match="cut off"):
        load_compacted(broken)
    assert not is_compacted(broken)
    other = tmp_path / "other.pt"
    torch.save({"state_dict": {}}, other)
    with pytest.raises(InputError, match="no compacted network"):
        load_compacted(other)
    assert not is_compacted(other)
    with pytest.raises(ValueError, match="GraphModule"):
        save_compacted(nn.Linear(2, 2), other)


def test_a_file_cannot_name_other_functions(tmp_path):
    network, x = make("mlp")
    path = save_compacted(compact(network, x), tmp_path / "c.pt")
    content = torch.load(path, weights_only=True)
    plan = json.loads(content["plan"])
    plan["nodes"][1][:3] = ["call_function", "evil", "os.system"]
    torch.save({**content, "plan": json.dumps(plan)}, path)
    with pytest.raises(InputError, match=r"os\.system"):
        load_compacted(path)
    plan["nodes"][1][:3] = ["call_method", "evil", "__reduce__"]
    torch.save({**content, "plan": json.dumps(plan)}, path)
    with pytest.raises(InputError, match="__reduce__"):
        load_compacted(path)
    plan = json.loads(content["plan"])
    next(iter(plan["modules"].values()))["class"] = "Module"
    torch.save({**content, "plan": json.dumps(plan)}, path)
    with pytest.raises(InputError, match="'Module'"):
        load_compacted(path)


def test_what_cannot_be_saved_is_named(tmp_path):
    class Sorts(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    with pytest.raises(InputError, match="bessel_j0"):
        save_compacted(compact(Sorts(), torch.randn(2, 3)), tmp_path / "c.pt")
    assert not list(tmp_path.iterdir())


class Batch(nn.Module):
    """Takes lists and dictionaries of tensors, and something optional before something else."""

    def __init__(self):
        super().__init__()
        self.read = nn.ModuleList(nn.Linear(size, 12) for size in (4, 6))
        self.head = nn.Linear(12, 3)

    def forward(self, parts, flag=None, more=None, scale=2.0):
        hidden = [torch.relu(read(part)) for read, part in zip(self.read, parts, strict=True)]
        return self.head(sum(hidden)) * scale * more["a"]["b"]


def test_inputs_in_lists_and_dictionaries(tmp_path):
    def batch(n):
        return [torch.randn(n, 4), torch.randn(n, 6)], None, {"a": {"b": torch.rand(n, 1)}}

    network = gate(Batch(), batch(2))
    for gates in hard_concretes(network).values():
        gates.log_alpha.data[::2] = -10
    smaller = compact(network.eval(), batch(2))
    again = load_compacted(save_compacted(smaller, tmp_path / "compacted.pt"))
    other = batch(5)
    torch.testing.assert_close(network(*other), smaller(*other))
    assert torch.equal(smaller(*other), again(*other))
    named = {"parts": other[0], "more": other[2]}
    assert torch.equal(again(**named), again(*other))
    gated = gate(again, other).eval()
    torch.testing.assert_close(compact(gated, other)(*other), gated(*other))


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


def test_a_dataclass_that_pytorch_does_not_know_is_returned():
    class Answers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return Answer(self.b(torch.relu(self.a(x))))

    x = torch.randn(3, 4)
    network = gate(Answers(), x).eval()
    found = compact(network, x)(x)
    assert isinstance(found, Answer)
    torch.testing.assert_close(found.logits, network(x).logits)
