import copy
import gc
import pickle

import pytest
import torch
import torch.utils.checkpoint
import torchvision
from torch import nn

import sparsereg
from sparsereg.compression import Accountant, compact, count, gate, load_compacted, save_compacted
from sparsereg.compression.macs import counting
from sparsereg.compression.running import tensors_in
from sparsereg.compression.units.gating import LARGE, times
from sparsereg.compression.units.structure import ATTRIBUTE
from sparsereg.compression.verify import difference, verify
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes
from tests.compression.units.networks import NETWORKS, build
from tests.compression.units.test_nonzero import exact


def example(name):
    return NETWORKS[name][1]


@pytest.fixture(scope="module")
def gated():
    """Each network with gates, made once; tests work on copies."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = gate(build(name), example(name), jitter=0.0)
        return copy.deepcopy(made[name])

    return of


@torch.no_grad()
def shuffle_(network, seed=0):
    """Gates that are shut, a little open, or wide open."""
    generator = torch.Generator().manual_seed(seed)
    for gates in hard_concretes(network).values():
        gates.log_alpha.copy_(3 * torch.randn(gates.log_alpha.shape, generator=generator))


@torch.no_grad()
def set_(network, value):
    for gates in hard_concretes(network).values():
        gates.log_alpha.fill_(value)


def test_transforms_of_torch_func_go_through_norms_with_gates():
    network = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    gated = gate(network, x, jitter=0.0).eval()
    shuffle_(gated)
    gated(x).square().sum().backward()
    weights = {name: p.detach() for name, p in gated.named_parameters()}

    def loss(w, one):
        return torch.func.functional_call(gated, w, (one[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for name, p in gated.named_parameters():
        if p.grad is not None and not name.endswith("log_alpha"):
            torch.testing.assert_close(each[name].sum(0), p.grad)


def first(answer):
    return tensors_in(answer)[0]


@pytest.mark.costly
@pytest.mark.parametrize("name", ["vision transformer", "resnet18"])
def test_gates_of_a_network_in_float64_are_folded_to_its_last_digits(name):
    network = gate(build(name).double(), example(name).double()).eval()
    shuffle_(network)
    small, x = compact(network, example(name).double()), example(name).double()
    with torch.no_grad():
        assert difference(first(network(x)), first(small(x))) < 1e-12


@pytest.mark.costly
@pytest.mark.parametrize("name", ["vision transformer", "resnet18"])
def test_a_network_in_bfloat16_stays_in_bfloat16(name):
    x = example(name).bfloat16()
    network = gate(build(name).bfloat16(), x)
    first(network(x)).float().square().mean().backward()
    shuffle_(network.eval())
    small = compact(network, x)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert difference(first(network(x)).float(), first(small(x)).float()) < 0.1


@pytest.mark.costly
@pytest.mark.parametrize("name", NETWORKS)
def test_open_gates_change_nothing(gated, name):
    network = gated(name)
    set_(network, 10.0)
    with torch.no_grad():
        assert difference(first(build(name)(example(name))), first(network(example(name)))) < 1e-5
    found = network.load_state_dict(build(name).state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(k.endswith(("gates.log_alpha", "gates._extra_state")) for k in found.missing_keys)


@pytest.mark.costly
@pytest.mark.parametrize("name", NETWORKS)
def test_compacted_network_has_the_counted_size_and_the_same_answers(gated, name):
    network = gated(name)
    shuffle_(network)
    sizes = count(network, example(name))
    smaller = compact(network, example(name))  # compares both in float64, too
    assert sum(p.numel() for p in smaller.parameters()) == sizes.compacted_parameters < sizes.parameters
    assert not hard_concretes(smaller)
    x = torch.cat([example(name), example(name).flip(0)])  # another batch size
    with torch.no_grad():
        assert difference(first(network(x)), first(smaller(x))) < 1e-5
    with counting() as counter, torch.no_grad():
        smaller(example(name))
    assert sizes.compacted_macs == counter.get_total_flops() / 2 / len(x) * 2


@pytest.mark.costly
@pytest.mark.parametrize("name", ["vision transformer", "encoder", "convnext"])
@torch.no_grad()
def test_a_network_in_float64_loses_nothing_to_gates_in_float32(name):
    data = example(name).double()
    network = gate(build(name).double(), data)
    for i, gates in enumerate(hard_concretes(network).values()):
        shut = torch.randperm(gates.log_alpha.numel(), generator=torch.Generator().manual_seed(i)) % 3 == 0
        gates.log_alpha.copy_(torch.where(shut, -10.0, 10.0))
    smaller = compact(network, data, check=False)
    assert difference(first(network(data)), first(smaller(data))) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_full_size_is_that_of_the_network(gated, name):
    with counting() as counter, torch.no_grad():
        build(name)(example(name))
    sizes = count(gated(name), example(name))
    assert sizes.parameters == sum(p.numel() for p in build(name).parameters())
    assert sizes.macs == counter.get_total_flops() / 2 / len(example(name))


@pytest.mark.parametrize("name", ["vision transformer", "decoder", "shufflenet"])
def test_expectation_is_exact_where_nothing_is_uncertain(gated, name):
    network = gated(name)
    shuffle_(network)
    with torch.no_grad():
        for gates in hard_concretes(network).values():
            gates.log_alpha.copy_(torch.where(gates.median() > 0, 30.0, -30.0))
            gates.log_alpha[0] = 30.0  # of no tensor everything goes
    sizes = count(network, example(name))
    assert sizes.expected_parameters == pytest.approx(sizes.compacted_parameters, rel=1e-6)
    assert sizes.expected_macs == pytest.approx(sizes.compacted_macs, rel=1e-6)
    assert Accountant(network, example(name)).exact_macs() == sizes.compacted_macs


def test_expected_cost_has_a_gradient_for_every_gate(gated):
    network = gated("decoder")
    accountant = Accountant(network, example("decoder"))
    accountant.expected_macs().backward()
    assert all(g.log_alpha.grad.abs().min() > 0 for g in accountant.gates)


def test_heads_width_and_hidden_units_are_families_of_their_own(gated):
    names = set(hard_concretes(gated("vision transformer")))
    assert {n.rpartition(".gates")[0].rpartition(".")[2] for n in names} == {
        "gate", "gate_heads", "gate_head_dims", "gate_blocks",
    }  # fmt: skip
    with pytest.raises(ValueError, match="nothing of channels that can go; it has blocks, head_dims, heads"):
        gate(build("vision transformer"), example("vision transformer"), families="channels")
    with pytest.raises(ValueError, match="families: unknown 'head'; known are channels"):
        gate(build("vision transformer"), example("vision transformer"), families=["head"])
    only = gate(build("vision transformer"), example("vision transformer"), families="heads")
    assert all("gate_heads" in name for name in hard_concretes(only))


def test_layers_that_share_a_gate_get_one_draw_in_a_pass(gated):
    network = gated("resnet18").train()
    bn1, bn2 = network.bn1, network.layer1[0].bn2
    assert bn1.gate is bn2.gate
    network(example("resnet18"))
    drawn = bn1.gate.gates()
    assert torch.equal(drawn, bn2.gate.gates())
    network(example("resnet18"))
    assert not torch.equal(drawn, bn1.gate.gates())


class Coder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
        self.decode = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.decode(self.encode(x))


def coder():
    torch.manual_seed(0)
    return gate(Coder(), torch.zeros(2, 8), jitter=0.0).train()


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def test_parts_that_are_called_one_by_one_share_a_draw_until_a_gradient_has_gone_through_it():
    network = coder()
    answers = []
    for _ in range(4):
        answers.append(network.decode(network.encode(X)))
        assert torch.equal(network.decode(network.encode(X)), answers[-1])
        answers[-1].square().mean().backward()
    assert all(not torch.equal(a, answers[0]) for a in answers[1:])
    assert all(g.log_alpha.grad.abs().max() > 0 for g in hard_concretes(network).values())


def test_parts_that_are_called_one_by_one_draw_as_the_whole_network_does():
    one, other = coder(), coder()
    for network, answer in ((one, one), (other, lambda x: other.decode(other.encode(x)))):
        torch.manual_seed(1)
        for _ in range(3):
            answer(X).square().mean().backward()
        network.last = [g.log_alpha.grad for g in hard_concretes(network).values()]
    assert all(map(torch.equal, one.last, other.last))


@pytest.mark.parametrize("whole", [True, False])
def test_gates_learn_after_a_pass_without_gradients(whole):
    network = coder()
    with torch.no_grad():
        (network if whole else network.encode)(X)
    network.decode(network.encode(X)).square().mean().backward()
    assert all(g.log_alpha.grad.abs().max() > 0 for g in hard_concretes(network).values())


def test_parts_outlive_the_network_that_was_gated():
    network = coder()
    encode, decode = network.encode, network.decode
    network(X)
    del network
    gc.collect()
    found = []
    for _ in range(3):
        found.append(decode(encode(X)))
        assert torch.equal(decode(encode(X)), found[-1])
        found[-1].sum().backward()
    assert not torch.equal(found[1], found[2])


class Padded(nn.Module):
    """What PyTorch's own transformer does with sequences that end early."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(15, 16), nn.Linear(16, 15)
        self.transformer = nn.Transformer(16, 4, 2, 2, 32, batch_first=True)

    def forward(self, source, target):
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x, y = self.embed(source), self.embed(target)
        padding = {"src_key_padding_mask": source == 0, "memory_key_padding_mask": source == 0}
        return self.head(self.transformer(x, y, tgt_mask=causal, **padding)), self.transformer.encoder(
            x, src_key_padding_mask=source == 0
        )


def test_a_transformer_of_pytorch_answers_alike_with_and_without_gradients_where_there_is_padding():
    source, target = torch.randint(1, 15, (3, 6)), torch.randint(1, 15, (3, 5))
    source[1, 4:] = source[2, 2:] = 0
    network = sparsereg.gate(Padded(), (source, target)).eval()
    for gates in hard_concretes(network).values():
        gates.log_alpha.data.uniform_(-0.5, 3.0)
        gates.log_alpha.data[: gates.log_alpha.numel() // 2] = -10
    wanted = network(source, target)
    with torch.no_grad():
        found = network(source, target)
        smaller = sparsereg.compact(network, (source, target))(source, target)
    for one, two, three in zip(wanted, found, smaller, strict=True):
        assert (one - two).abs().max() < 1e-5
        assert (one - three).abs().max() < 1e-5


def test_parts_that_are_computed_again_get_the_gates_of_their_pass_or_are_refused():
    plain, again = coder(), coder()
    for network in (plain, again):
        torch.manual_seed(1)
        network(X)
    plain.decode(plain.encode(X)).square().mean().backward()
    hidden = torch.utils.checkpoint.checkpoint(again.encode, X, use_reentrant=False)
    torch.utils.checkpoint.checkpoint(again.decode, hidden, use_reentrant=False).square().mean().backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    x = X.clone().requires_grad_()
    hidden = torch.utils.checkpoint.checkpoint(again.encode, x, use_reentrant=True)
    answer = torch.utils.checkpoint.checkpoint(again.decode, hidden, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use torch.utils.checkpoint with use_reentrant=False"):
        answer.square().mean().backward()


@pytest.mark.parametrize("name", ["vision transformer", "decoder", "encoder", "convnext"])
def test_every_gate_learns(gated, name):
    network = gated(name).train()
    first(network(example(name))).square().sum().backward()
    for path, gates in hard_concretes(network).items():
        assert gates.log_alpha.grad is not None, path
        assert gates.log_alpha.grad.isfinite().all(), path


@pytest.mark.costly
def test_gates_are_found_again_without_what_gate_knew(gated):
    """A pickle keeps the gates, not the analysis: it is made anew."""
    for name in ("vision transformer", "shufflenet"):
        network = gated(name)
        shuffle_(network)
        other = pickle.loads(pickle.dumps(network))
        assert other.__dict__[ATTRIBUTE] is None
        a, b = count(network, example(name)), count(other, example(name))
        assert a == b


@pytest.mark.parametrize("name", ["vision transformer", "decoder", "encoder"])
def test_file_of_a_smaller_transformer_loads_and_trains_on(gated, name, tmp_path):
    network = gated(name)
    shuffle_(network)
    smaller = compact(network, example(name))
    again = load_compacted(save_compacted(smaller, tmp_path / "compacted.pt"))
    with torch.no_grad():
        assert torch.equal(first(smaller(example(name))), first(again(example(name))))
    first(again.train()(example(name))).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


class Norms(nn.Module):
    """A stream that three kinds of norm take means over, one of them the author's own."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(10) + 0.5)

        def forward(self, x):
            return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(6, 10)
        self.norms = nn.ModuleList([nn.LayerNorm(10), nn.RMSNorm(10, eps=1e-5), self.Own()])
        self.hidden = nn.ModuleList([nn.Linear(10, 10) for _ in range(3)])
        self.out = nn.Linear(10, 2)

    def forward(self, x):
        x = self.into(x)
        for norm, layer in zip(self.norms, self.hidden, strict=True):
            x = x + layer(norm(x)).tanh()
        return self.out(self.norms[0](x))


def test_norms_take_means_over_what_is_open():
    torch.manual_seed(0)
    network, x = Norms().eval(), torch.randn(3, 6)
    gated = gate(network, x, families="width")
    (gates,) = hard_concretes(gated).values()
    with torch.no_grad():
        gates.log_alpha.copy_(torch.tensor([10.0, -10.0] * 5))
    kept = slice(0, 10, 2)
    small = copy.deepcopy(network)
    with torch.no_grad():
        small.into.weight, small.into.bias = (nn.Parameter(p[kept]) for p in network.into.parameters())
        for i, layer in enumerate(network.hidden):
            small.hidden[i].weight = nn.Parameter(layer.weight[kept, kept])
            small.hidden[i].bias = nn.Parameter(layer.bias[kept])
        small.norms[0] = nn.LayerNorm(5)
        small.norms[0].weight, small.norms[0].bias = (
            nn.Parameter(p[kept]) for p in network.norms[0].parameters()
        )
        small.norms[1] = nn.RMSNorm(5, eps=1e-5)
        small.norms[1].weight = nn.Parameter(network.norms[1].weight[kept])
        small.norms[2].scale = nn.Parameter(network.norms[2].scale[kept])
        small.out.weight = nn.Parameter(network.out.weight[:, kept])
        assert difference(small(x), gated(x)) < 1e-6
        assert difference(small(x), compact(gated, x)(x)) < 1e-6


def test_dropout_drops_again_after_compaction():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 2)).eval()
    smaller = compact(gate(network, torch.randn(2, 4)), torch.randn(2, 4))
    x = torch.randn(2, 4)
    assert torch.equal(smaller(x), smaller(x))
    smaller.train()
    assert not torch.equal(smaller(x), smaller(x))


def test_maps_of_another_size_are_taken_or_refused():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    x = torch.randn(1, 3, 8, 8)
    assert compact(gate(conv, x), x)(torch.randn(1, 3, 11, 9)).shape == (1, 2, 7, 5)
    flat = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    smaller = compact(gate(flat, x), x)
    with pytest.raises((ValueError, RuntimeError)):
        smaller(torch.randn(1, 3, 9, 9))


class Scaled(nn.Module):
    """A parameter that is a single number, and an input of a shape that decides on the weights' labels."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.out(self.into(x).relu() * self.scale)


def test_single_numbers_among_the_parameters_are_counted():
    network = gate(Scaled().eval(), torch.randn(2, 4))
    sizes = count(network, torch.randn(2, 4))
    assert sizes.parameters == 4 * 8 + 8 + 8 * 2 + 2 + 1
    assert {row.name: row.kept_channels for row in sizes.layers}["out"] == 2


def test_gates_that_fit_nothing_are_not_taken_for_open():
    """A layer that took gates and is put in the place of another's: its gates belong to no unit there."""
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    taken = gate(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), x)
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), taken[0])
    with pytest.raises(InputError, match=r"gate 0 of 2\.gate\.gates belongs to no unit of Sequential"):
        count(other, x)


class Bags(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.bags = nn.EmbeddingBag(20, 8, **settings)
        self.head = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, ids, offsets=None):
        return self.head(self.bags(ids, offsets))


@pytest.mark.parametrize(
    "example",
    [(torch.arange(24).reshape(4, 6) % 17,), (torch.arange(24) % 17, torch.tensor([0, 5, 6, 6, 17]))],
)
def test_bags_are_gated_counted_and_compacted_with_offsets_or_without(example):
    torch.manual_seed(0)
    network = gate(Bags(mode="mean", padding_idx=2), example).double().eval()
    shuffle_(network)
    sizes = count(network, example)
    smaller = compact(network, example)
    assert sum(p.numel() for p in smaller.parameters()) == sizes.compacted_parameters < sizes.parameters
    assert min(w.shape[1] for w in smaller.parameters() if w.shape[0] == 20) < 8
    assert difference(network(*example), smaller(*example)) < 1e-12


def test_a_noise_that_a_network_refuses_hides_no_difference():
    """Offsets turned round are none: what is compared then is the example and the numbers beside them."""
    example = (torch.arange(24) % 17, torch.tensor([0, 5, 6, 6, 17]))
    network, other = Bags(), Bags()
    with pytest.raises(RuntimeError, match="gives other answers"):
        verify(network, other, copy.deepcopy(other).double(), example, {})
    verify(network, network, copy.deepcopy(network).double(), example, {})


class Counting(nn.Module):
    """Changes its own state in eval mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layers(x)


@pytest.mark.parametrize(
    ("network", "example", "names"),
    [
        (Counting(), torch.ones(2, 6), "calls"),
        (Bags(max_norm=1.0), torch.ones(2, 3, dtype=torch.int64), "bags.weight"),
    ],
)
def test_networks_that_change_themselves_are_refused_in_one_line(network, example, names):
    with pytest.raises(
        InputError, match=f"it writes into {names} in eval mode.*where self.training"
    ) as caught:
        gate(network, example)
    assert "\n" not in str(caught.value)


def test_a_norm_with_gates_takes_means_under_autocast():
    torch.manual_seed(0)
    layers = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)
    network, x = gate(nn.Sequential(*layers), torch.ones(2, 6)), torch.randn(4, 6)
    shuffle_(network)
    network.eval()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x)
    assert difference(network(x), rounded) < 0.05


@pytest.mark.costly
def test_windows_that_are_moved_before_they_are_flattened():
    """What is left of a copy need not lie in memory as the whole copy did."""
    torch.manual_seed(0)
    network = torchvision.models.SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=3).eval()
    x = torch.randn(2, 3, 12, 12)
    gated = gate(network, x, jitter=0.0)
    with torch.no_grad():
        for gates in hard_concretes(gated).values():
            gates.log_alpha[::2] = -10.0 if gates.log_alpha.numel() > 1 else 10.0
    small = compact(gated, x)
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in network.parameters())


class Known(nn.Module):
    """One layer and one block that the network knows by two names each, as CoaT's blocks do."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave, self.one = nn.Linear(5, 16), nn.Linear(16, 3), nn.Linear(16, 16)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)] * 2)
        self.two = self.one

    def forward(self, x):
        x = self.enter(x)
        x = self.two(self.one(x).relu()).relu()
        return self.leave(self.blocks[1](self.blocks[0](x)))


def test_modules_that_are_known_by_two_names_get_their_gates_once():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    network = gate(Known().double().eval(), x).double()
    shuffle_(network)
    assert difference(compact(network, x)(x), network(x)) < 1e-12


def test_a_layer_norm_of_what_is_open_has_the_gradients_of_one_without_the_rest():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    network = nn.Sequential(nn.Linear(10, 10), nn.LayerNorm(10), nn.Linear(10, 3)).double()
    gated = gate(network, x.detach(), families="width").train()
    set_(gated, -1.5)  # each is shut with probability 1/2
    (gates,) = hard_concretes(gated).values()
    answer = gated(x)
    with torch.no_grad():
        kept = gates().nonzero().flatten()  # the draw of this pass
    assert 0 < len(kept) < 10
    z = gates()[kept].detach().double()
    into, norm, out = network
    stream = x @ into.weight[kept].mT + into.bias[kept]
    normed = nn.functional.layer_norm(stream, (len(kept),), norm.weight[kept] * z, norm.bias[kept] * z)
    wanted = normed @ out.weight[:, kept].mT + out.bias
    assert difference(wanted, answer) < 1e-12
    upstream = torch.randn_like(answer)
    named = dict(gated.named_parameters())
    places = [x, *network.parameters()], [x, *(named[n] for n, _ in network.named_parameters())]
    by_hand, ours = (
        torch.autograd.grad((y * upstream).sum(), p, create_graph=True)
        for y, p in zip((wanted, answer), places, strict=True)
    )
    for a, b in zip(by_hand, ours, strict=True):
        assert difference(a, b) < 1e-12
    second = [torch.autograd.grad(g[0].square().sum(), x, retain_graph=True)[0] for g in (by_hand, ours)]
    assert difference(*second) < 1e-12


class Added(nn.LayerNorm):
    """A module that reads its input beside the norm that it is called for."""

    def forward(self, x):
        return x + super().forward(x)


class Rectified(nn.LayerNorm):
    """A norm of something else than what comes in."""

    def __init__(self, size):
        super().__init__(size)
        self.before = nn.ReLU()

    def forward(self, x):
        return super().forward(self.before(x))


@pytest.mark.parametrize("norm", [Added, Rectified])
def test_a_module_that_does_more_than_to_norm_its_input_keeps_what_it_norms(norm):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), norm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(2, 5, dtype=torch.float64)
    gated = gate(network.eval(), x)
    shuffle_(gated)
    assert difference(compact(gated, x)(x), gated(x)) < 1e-12
    table = sparsereg.explain(network, x).to_frame()
    assert set(table[table.parameter == "0.weight"].state) == {"kept"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_first_derivatives_alone_are_those_that_can_be_differentiated_again(dtype):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 10), nn.LayerNorm(10), nn.Linear(10, 3)).to(dtype)
    x = torch.randn(4, 10, dtype=dtype, requires_grad=True)
    gated = gate(network, x.detach(), families="width").train()
    set_(gated, -1.5)
    answer = gated(x)
    parameters = [x, *gated.parameters()]
    once = torch.autograd.grad(answer.sum(), parameters, retain_graph=True)
    twice = torch.autograd.grad(answer.sum(), parameters, create_graph=True)
    for a, b in zip(once, twice, strict=True):
        assert difference(a, b) < (1e-12 if dtype == torch.float64 else 5e-2)


@pytest.mark.parametrize("shape", [(400, 400), (512, 32, 3, 3)])
def test_large_weights_are_multiplied_by_their_gates_with_exact_gradients(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    factor = torch.rand(shape[0], *[1] * (len(shape) - 1), dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape, dtype=torch.float64)
    assert weight.numel() >= LARGE
    product, wanted = times(weight, factor), weight * factor
    assert torch.equal(product, wanted)
    for a, b in zip(
        torch.autograd.grad(product, (weight, factor), upstream),
        torch.autograd.grad(wanted, (weight, factor), upstream),
        strict=True,
    ):
        assert difference(a, b) < 1e-12


def test_large_complex_weights_take_gates():
    weight, factor = torch.randn(512, LARGE // 512, dtype=torch.cfloat), torch.rand(512, 1)
    assert torch.equal(times(weight, factor.to(weight)), weight * factor)


class Squashed(nn.LayerNorm):
    """Does more than to norm what it is given."""

    def forward(self, x):
        return super().forward(x).sigmoid()


class Modulated(nn.Module):
    """A residual stream whose norm has no weights, but a scale and a shift that come from elsewhere."""

    def __init__(self, norm):
        super().__init__()
        self.enter, self.norm, self.given = nn.Linear(6, 12), norm, nn.Linear(6, 24)
        self.one, self.two, self.out = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x):
        scale, shift = self.given(x).chunk(2, -1)
        x = self.enter(x)
        x = x + self.two(self.one(self.norm(x) * (1 + scale) + shift).relu())
        return self.out(self.norm(x))


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(12, elementwise_affine=False),
        lambda: nn.RMSNorm(12, elementwise_affine=False),
        lambda: nn.GroupNorm(3, 12, affine=False),
    ],
)
def test_width_goes_past_norms_without_weights(norm):
    assert exact(Modulated(norm()), torch.randn(5, 6, dtype=torch.float64)) == [1, 12, 20]


def test_a_norm_without_weights_and_something_else_in_one_module_keeps_the_width():
    said = str(sparsereg.explain(Modulated(Squashed(12, elementwise_affine=False)), torch.randn(5, 6)))
    assert "layer_norm is taken over it in a way of its own (layer_norm in norm, test_gating.py:" in said
