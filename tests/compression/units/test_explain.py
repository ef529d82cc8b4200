import warnings

import pandas as pd
import pytest
import torch
from torch import nn

import sparsereg
from sparsereg.compression.units.explain import STATES
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes
from sparsereg.target_settings import FAMILIES
from tests.compression.units.networks import NETWORKS, build


def frame(name):
    return sparsereg.explain(build(name), NETWORKS[name][1]).to_frame()


def free(table):
    return table[table.state == "can go"].groupby("family")["size"].apply(list).to_dict()


def test_families_of_a_vision_transformer():
    found = free(frame("vision transformer"))
    assert found["width"] == [24]  # tokens, positions, patches and all that writes the stream go together
    assert found["heads"] == [3, 3]
    assert found["head_dims"] == [8, 8, 8]  # queries with keys and values in one, apart in the other
    assert found["units"] == [72, 72]


@pytest.mark.parametrize(("width", "heads"), [(32, 8), (24, 3), (16, 4), (32, 2)])
def test_heads_of_queries_keys_and_values_in_one_product(width, heads):
    layer = nn.TransformerEncoderLayer(width, heads, 12, batch_first=True)
    explained = sparsereg.explain(
        nn.Sequential(nn.Linear(5, width), layer, nn.Linear(width, 2)), torch.randn(2, 7, 5)
    )
    table = explained.to_frame()
    own = table[(table.parameter == "1.self_attn.in_proj_weight") & (table.axis == 0)]
    assert dict(zip(own.family, own["size"], strict=True)) == {"heads": heads, "head_dims": width // heads}
    assert (own.state == "can go").all()


def test_grouped_queries_share_keys_and_rotary_pairs_stay_pairs():
    found = free(frame("decoder"))
    assert found["kv_groups"] == [2]
    assert sorted(found["head_dims"]) == [4, 8]  # 4 pairs of 8 rotated places, 8 places of values
    assert found["units"] == [40]


def test_channels_and_what_they_are_tied_to():
    table = frame("resnet18")
    outputs = table[table.axis == 0].set_index("parameter")
    assert outputs.reason["layer1.0.conv2.weight"] == "with conv1.weight axis 0"
    assert outputs.state["layer1.0.conv1.weight"] == "can go"
    assert outputs.state["fc.weight"] == "kept"
    assert outputs.reason["fc.weight"] == "it reaches the output"


@pytest.mark.costly
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_explained_in_known_words(name):
    network = build(name)
    explanation = sparsereg.explain(network, NETWORKS[name][1])
    table = explanation.to_frame()
    assert list(table.columns) == ["parameter", "axis", "size", "family", "state", "reason"]
    assert set(table.parameter) == {n for n, _ in network.named_parameters()}
    assert set(table.family) <= {*FAMILIES, ""}
    assert set(table.state) <= set(STATES)
    assert (table.reason[table.state != "can go"] != "").all()
    assert explanation.parameters == sum(p.numel() for p in network.parameters())
    assert explanation.removable > 0.5 * explanation.parameters
    text = str(explanation)
    assert type(network).__name__ in text
    assert all(p in text for p in table.parameter)


def test_what_keeps_something_is_named_with_its_line():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.fft.fft(self.a(x)).real)

    explanation = sparsereg.explain(Sorted(), torch.randn(3, 4))
    assert "fft_fft runs along it (fft_fft, test_explain.py:" in str(explanation)
    assert explanation.removable == 0


def test_dictionaries_are_inputs_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, left, right=None):
            return {"out": self.b(torch.relu(self.a(left + right)))}

    explanation = sparsereg.explain(Two(), {"left": torch.randn(2, 4), "right": torch.randn(2, 4)})
    assert free(explanation.to_frame()) == {"units": [6]}
    assert isinstance(explanation.to_frame(), pd.DataFrame)


def test_what_is_not_zero_stays_where_no_column_can_be():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = 2 ** self.a(x)
            return self.b(x) + x.sum(-1, keepdim=True)

    table = sparsereg.explain(Kept(), torch.randn(3, 4)).to_frame().set_index(["parameter", "axis"])
    kept = table.loc[("a.weight", 0)]  # 2 ** 0 is 1, which the sum sums
    assert (kept["size"], kept["state"]) == (6, "kept")
    assert kept["reason"].startswith("sum sums over values that are not zero when it is gone")


def test_wrong_use_is_one_line():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(
        InputError, match=r"Branch cannot be traced at test_explain.py:\d+ .*torch.where"
    ) as said:
        sparsereg.explain(Branch(), torch.randn(2, 3))
    assert "\n" not in str(said.value)
    with pytest.raises(InputError, match="Linear cannot be traced.*as the network takes it"):
        sparsereg.explain(nn.Linear(3, 2), torch.randn(2, 4))
    with pytest.raises(ValueError, match="example_input must be a tensor"):
        sparsereg.explain(nn.Linear(3, 2), 5)


def test_the_network_is_left_alone():
    network = build("encoder").train()
    network[1].layers[0].eval()
    modes = [m.training for m in network.modules()]
    before = {k: v.clone() for k, v in network.state_dict().items()}
    sparsereg.explain(network, NETWORKS["encoder"][1])
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_an_example_is_refused_in_the_words_of_the_network():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(InputError, match=r"cannot be traced: .*\[2, 1, 8, 8\] to have 3 channels, but got 1"):
        sparsereg.explain(net, torch.randn(2, 1, 8, 8))
    with pytest.raises(InputError, match="Linear cannot be traced: mat1 and mat2 must have the same dtype"):
        sparsereg.explain(nn.Linear(3, 4), torch.randn(2, 3, dtype=torch.float64))


def test_what_is_no_network_is_refused():
    calls = [
        lambda f, x: sparsereg.gate(f, x),
        lambda f, x: sparsereg.compact(f, x),
        lambda f, x: sparsereg.count(f, x),
        lambda f, x: sparsereg.shrink(f, x, target_macs=0.5),
        sparsereg.explain,
    ]
    for call in calls:
        with pytest.raises(ValueError, match="model must be a torch.nn.Module, got a builtin_function"):
            call(torch.relu, torch.randn(2, 3))


def test_what_cannot_be_looked_into_is_refused():
    def net():
        return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

    partly = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of what it will do otherwise one day
        quantized = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})
        partly[0], scripted = torch.jit.script(partly[0]), torch.jit.script(net())
    with torch.device("meta"):
        empty = net()
    refused = {
        "0, a RecursiveScriptModule, runs as TorchScript: give the network from before": partly,
        "the RecursiveScriptModule runs as TorchScript": scripted,
        "0, a Linear, has quantized weights: compact the network from before": quantized,
        "0.weight is on the device meta, without numbers": empty,
        "shares its batches out to processes: give its .module": nn.parallel.DistributedDataParallel.__new__(
            nn.parallel.DistributedDataParallel
        ),
    }
    nn.Module.__init__(refused["shares its batches out to processes: give its .module"])
    for match, network in refused.items():
        for call in (sparsereg.gate, sparsereg.compact, sparsereg.explain):
            with pytest.raises(InputError, match=match):
                call(network, torch.randn(2, 3))


def test_data_parallel_networks_take_gates():
    net = nn.DataParallel(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    gated = sparsereg.gate(net, x := torch.randn(4, 3)).eval()
    next(iter(hard_concretes(gated).values())).log_alpha.data[:5] = -10
    smaller = sparsereg.compact(gated, x)
    assert sum(p.numel() for p in smaller.parameters()) == 3 * 4 + 2 * 4
    assert torch.allclose(smaller(x), gated(x), atol=1e-6)
