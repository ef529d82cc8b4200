"""The loop API: targets are met exactly, states go on bitwise, wrong use is said in one line."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

import sparsereg
from sparsereg import Sparsifier
from sparsereg.compression.batch_norm_folding import fuse
from sparsereg.compression.running import tensors_in
from sparsereg.compression.timing.measured import TOLERANCE
from sparsereg.errors import InputError
from sparsereg.loops.reading import like
from sparsereg.penalties import hard_concretes


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))


def batches(n=8):
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(n, 16, 6, generator=draws)
    return [(a, (a[:, 0] + a[:, 1] > 0).long()) for a in x]


def train(sparsifier, optimizer, steps, first=0):
    for i in range(first, first + steps):
        x, y = batches()[i % 8]
        loss = sparsifier.loss(F.cross_entropy(sparsifier.model(x), y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step()


def adam(sparsifier):
    return torch.optim.AdamW(sparsifier.parameter_groups(1e-2, weight_decay=0.01))


@pytest.mark.parametrize(
    ("target", "cost", "kept"), [("target_macs", "macs", 0.4), ("target_sparsity", "parameters", 0.7)]
)
def test_target_is_met_and_the_smaller_network_answers_the_same(target, cost, kept):
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    value = kept if cost == "macs" else 1 - kept
    sparsifier = Sparsifier(net, torch.zeros(2, 6), steps=60, **{target: value})
    train(sparsifier, adam(sparsifier), 60)
    small = sparsifier.finish()
    count = sparsereg.count(sparsifier.model, torch.zeros(2, 6))
    full, left = (getattr(count, f"{prefix}{cost}") for prefix in ("", "compacted_"))
    assert 0.9 * kept <= left / full <= kept
    assert sum(p.numel() for p in small.parameters()) == count.compacted_parameters
    x = torch.randn(5, 6)
    torch.testing.assert_close(small(x), sparsifier.model.eval()(x), rtol=1e-4, atol=1e-5)
    assert not hard_concretes(net)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


def trained():
    net = mlp()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for x, y in batches() * 20:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def test_one_shot_decides_before_the_first_step_and_all_steps_train_what_is_left():
    net, inputs = trained(), [x for x, _ in batches(32)]
    sparsifier = Sparsifier(net, torch.zeros(2, 6), steps=30, target_sparsity=0.6, data=inputs)
    small = sparsifier.finish()
    expected = sparsereg.shrink(net, inputs, target_sparsity=0.6, num_inputs=512, progress=False)
    x = torch.randn(5, 6)
    torch.testing.assert_close(small(x), expected(x), rtol=1e-4, atol=1e-5)
    places = [location.detach().clone() for location in sparsifier.gates]
    train(sparsifier, adam(sparsifier), 30)
    assert all(torch.equal(a, b) for a, b in zip(places, sparsifier.gates, strict=True))
    longer = sparsifier.finish()
    assert sum(p.numel() for p in longer.parameters()) == sum(p.numel() for p in small.parameters())
    assert not torch.allclose(longer(x), small(x), rtol=1e-3)
    torch.testing.assert_close(longer(x), sparsifier.model.eval()(x), rtol=1e-4, atol=1e-5)


def test_in_place_and_compacted_training_are_the_same():
    """What is shut takes no part: plain SGD on the whole network moves what is left as on the small one."""
    sparsifier = Sparsifier(
        trained(), torch.zeros(2, 6), steps=10, target_sparsity=0.6, data=[x for x, _ in batches(32)]
    )
    small = sparsifier.finish()
    for net in (small, sparsifier.model.train()):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    x = torch.randn(5, 6)
    torch.testing.assert_close(small(x), sparsifier.model.eval()(x), rtol=1e-4, atol=1e-5)


def test_one_shot_needs_inputs_and_a_target_that_is_no_time(milliseconds):
    with pytest.raises(InputError, match="there are no inputs"):
        Sparsifier(mlp(), torch.zeros(2, 6), steps=3, target_macs=0.5, data=[])
    limit = 0.5 * milliseconds(mlp())
    with pytest.raises(InputError, match="for a start in one shot give target_macs"):
        Sparsifier(
            mlp(), torch.zeros(2, 6), steps=3, target_latency_ms=limit, runtime="eager", data=batches()
        )


def test_constraint_closes_gates_before_the_end():
    sparsifier = Sparsifier(mlp(), torch.zeros(2, 6), steps=200, target_macs=0.3)
    train(sparsifier, adam(sparsifier), 200)
    assert float(sparsifier.budget.expected_share().detach()) < 0.33


def test_state_goes_on_bitwise_from_any_step():
    ends = []
    for stops in ([30], [13, 17]):
        torch.manual_seed(5)
        sparsifier = Sparsifier(mlp(), torch.zeros(2, 6), steps=30, target_macs=0.4)
        torch.manual_seed(6)
        optimizer, first = adam(sparsifier), 0
        for n in stops:
            train(sparsifier, optimizer, n, first)
            first += n
            kept = copy.deepcopy(
                [sparsifier.model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()]
            )
            noise = torch.get_rng_state()
            sparsifier = Sparsifier(mlp(), torch.zeros(2, 6), steps=30, target_macs=0.4)
            optimizer = adam(sparsifier)
            sparsifier.model.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
            sparsifier.load_state_dict(kept[2])
            torch.set_rng_state(noise)
        ends.append(kept[0])
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_state_loads_weights_only_and_of_other_gates_is_refused(tmp_path):
    sparsifier = Sparsifier(mlp(), torch.zeros(2, 6), steps=30, target_macs=0.4)
    train(sparsifier, adam(sparsifier), 3)
    torch.save(sparsifier.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    sparsifier.load_state_dict(state)
    other = Sparsifier(mlp(), torch.zeros(2, 6), steps=30, target_macs=0.4, layers="0")
    with pytest.raises(ValueError, match="of other gates"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="not the state of a Sparsifier"):
        other.load_state_dict({"step": 3})


def test_accumulated_batches_have_the_penalty_once_and_added_gradients_are_those_of_the_loss():
    grads = []
    for way in ("loss", "halves", "added"):
        torch.manual_seed(0)
        sparsifier = Sparsifier(mlp(), torch.zeros(2, 6), steps=30, target_macs=0.4)
        for gate in hard_concretes(sparsifier.model).values():
            gate.eval()  # no noise: the halves see the same gates
        sparsifier.at(0.5)
        x, y = batches()[0]
        if way == "halves":
            for part in (slice(0, 8), slice(8, 16)):
                loss = F.cross_entropy(sparsifier.model(x[part]), y[part])
                (sparsifier.loss(loss) / 2).backward()
        else:
            loss = F.cross_entropy(sparsifier.model(x), y)
            (sparsifier.loss(loss) if way == "loss" else loss).backward()
            if way == "added":
                sparsifier.add_gradient_()
        grads.append(torch.cat([a.grad for a in sparsifier.gates]))
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[0], grads[2])


class Pair(nn.Module):
    """Texts as dictionaries, as in a classifier of them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask):
        x = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return {"logits": self.head(x.mean(1))}


def test_dictionaries_of_texts():
    torch.manual_seed(0)
    ids = torch.randint(50, (8, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}
    example = {name: batch[name] for name in ("input_ids", "attention_mask")}
    sparsifier = Sparsifier(Pair(), example, steps=10, target_sparsity=0.4)
    optimizer = adam(sparsifier)
    for _ in range(10):
        logits = sparsifier.model(**example)["logits"]
        loss = sparsifier.loss(F.cross_entropy(logits, batch["labels"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step()
    small = sparsifier.finish([batch])
    torch.testing.assert_close(
        small(**example)["logits"], sparsifier.model.eval()(**example)["logits"], rtol=1e-4, atol=1e-5
    )


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU()
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 12, 4, 2, 1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 1, 4, 2, 1),
        )

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_autoencoder_has_statistics_of_the_batches_at_the_end():
    torch.manual_seed(0)
    x = torch.rand(32, 1, 16, 16)
    sparsifier = Sparsifier(Autoencoder(), x[:2], steps=10, target_macs=0.5)
    optimizer = adam(sparsifier)
    for _ in range(10):
        loss = sparsifier.loss(F.mse_loss(sparsifier.model(x), x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step()
    small = sparsifier.finish((x[i : i + 16], x[i : i + 16]) for i in (0, 16))
    model = sparsifier.model.eval()
    mean = torch.stack([model.encoder[0](x[i : i + 16]).mean((0, 2, 3)) for i in (0, 16)]).mean(0)
    torch.testing.assert_close(model.encoder[1].running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def convolutional():
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 60, 3), nn.ReLU()]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(60, 5))


def test_milliseconds_are_held_while_training_and_met_by_what_is_measured(milliseconds):
    net, x = convolutional(), torch.randn(16, 3, 8, 8)
    asked = 0.4 * milliseconds(net)
    draws = torch.get_rng_state()
    how = {"runtime": "eager", "batch": 4}
    sparsifier = Sparsifier(net, x[:2], steps=40, target_latency_ms=asked, **how)
    assert torch.equal(draws, torch.get_rng_state())
    assert sparsifier.budget.measured.what == "eager, 1 thread, batch 4"
    optimizer = adam(sparsifier)
    for _ in range(40):
        loss = sparsifier.loss(F.cross_entropy(sparsifier.model(x), torch.arange(16) % 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step()
    assert float(sparsifier.budget.expected_share().detach()) < 0.5  # before anything is cut off
    small = sparsifier.finish([x])
    assert sparsifier.budget.reached == pytest.approx(asked, rel=TOLERANCE)
    assert milliseconds(fuse(small)) == pytest.approx(sparsifier.budget.reached)
    torch.testing.assert_close(small(x), sparsifier.model.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"^target_latency_ms=1e-06: with all gates shut .*: ask for more$"):
        Sparsifier(net, x[:2], steps=40, target_latency_ms=1e-6, **how)
    with pytest.raises(
        InputError, match=r"^target_latency_ms=1e\+06: the whole network takes .*: ask for less"
    ):
        Sparsifier(net, x[:2], steps=40, target_latency_ms=1e6, **how)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x + torch.randn_like(x))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"example": torch.zeros(2, 7)}, r"cannot be called with this example \(float32 \(2, 7\)\)"),
        ({"example": {"y": torch.zeros(2, 6)}}, "cannot be called with this example"),
        ({"example": 3}, "must be a tensor, a tuple of inputs or a dictionary"),
        ({"families": "heads"}, "nothing of heads that can go; it has units"),
        ({"families": "hats"}, "unknown 'hats'"),
        ({"target_macs": 0.001}, r"cannot be met: with every gate shut \d+.\d+% of the macs stay"),
        ({"target_macs": None, "target_sparsity": 0.999}, "cannot be met"),
        ({"model": Noisy()}, "answers differently when it is called twice in eval mode"),
        ({"model": nn.Linear(6, 2)}, "there is nothing to gate"),
        ({"target_sparsity": 0.5}, "give one of target_sparsity, target_macs and target_latency_ms, got t"),
        ({"target_macs": None}, "got none"),
        ({"target_macs": 1.5}, r"target_macs must be a share in \(0, 1\), got 1.5"),
        ({"target_macs": None, "target_latency_ms": 0}, "target_latency_ms must be a number > 0, got 0"),
        ({"batch": 8}, "batch=8 says how target_latency_ms is measured: give that, too"),
        ({"target_macs": None, "target_latency_ms": 3, "runtime": "tvm"}, "some of eager, .*, got 'tvm'"),
        ({"target_macs": None, "target_latency_ms": 3, "threads": 0}, "threads must be an integer >= 1"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"ramp": 0.0}, "ramp"),
        ({"gate_lr": -1.0}, "gate_lr must be a number > 0"),
    ],
)
def test_wrong_use_is_said_in_one_line(changes, says):
    given = {"model": mlp(), "example": torch.zeros(2, 6), "steps": 5, "target_macs": 0.5} | changes
    model = given.pop("model")
    with pytest.raises(ValueError, match=says) as caught:
        Sparsifier(model, given.pop("example"), **given)
    assert "\n" not in str(caught.value).partition("nothing to gate:")[0]
    assert not hard_concretes(model)


class Raw(nn.Module):
    """A detector up to where it selects boxes."""

    def __init__(self, detector):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images):
        maps = self.backbone(images)
        return self.head(list(maps.values()) if isinstance(maps, dict) else [maps])


PLAIN = {"weights": None, "weights_backbone": None}
DETECTORS = {
    "retinanet_resnet50_fpn": 128,
    "retinanet_resnet50_fpn_v2": 128,
    "fcos_resnet50_fpn": 128,
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
    "fasterrcnn_mobilenet_v3_large_fpn": 128,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_detectors_are_halved_in_front_of_the_selection_of_boxes(name):
    torch.manual_seed(0)
    detector = getattr(detection, name)(**PLAIN).eval().double()
    if hasattr(detector, "rpn"):
        detector.head = detector.rpn.head
    half(Raw(detector), torch.randn(2, 3, DETECTORS[name], DETECTORS[name], dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize(("part", "size"), [("box", 7), ("mask", 14), ("keypoint", 14)])
@torch.no_grad()
def test_heads_of_regions_are_halved(part, size):
    torch.manual_seed(0)
    kind = {"box": "fasterrcnn", "mask": "maskrcnn", "keypoint": "keypointrcnn"}[part]
    heads = getattr(detection, f"{kind}_resnet50_fpn")(**PLAIN).eval().double().roi_heads
    network = nn.Sequential(getattr(heads, f"{part}_head"), getattr(heads, f"{part}_predictor"))
    half(network, torch.randn(3, 256, size, size, dtype=torch.float64))


def half(network, x):
    """Shut a random half of the gates of a network; what is left gives the same."""
    gated = sparsereg.gate(network, x)
    for gates in hard_concretes(gated).values():
        gates.log_alpha.copy_(torch.where(torch.rand_like(gates.log_alpha) < 0.5, -20.0, 20.0))
    small = sparsereg.compact(gated, x)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in network.parameters())
    more = torch.cat([x, x[:1]])  # another number of examples
    for one, other in zip(tensors_in(small(more)), tensors_in(gated(more)), strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.std()


def test_a_detector_learns_by_its_own_losses():
    torch.manual_seed(0)
    conv = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
    backbone = nn.Sequential(*conv)
    backbone.out_channels = 32
    anchors = AnchorGenerator(((8, 16),), ((0.5, 1.0, 2.0),))
    detector = RetinaNet(backbone, 3, anchor_generator=anchors, min_size=32, max_size=32)
    images = torch.rand(4, 3, 32, 32)
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 20.0, 20.0]]), "labels": torch.tensor([1])}] * 4
    sparsifier = Sparsifier(Raw(detector), images, target_macs=0.5, steps=6)
    detector.backbone, detector.head = sparsifier.model.backbone, sparsifier.model.head
    detector.backbone.out_channels = 32
    optimizer = torch.optim.AdamW(sparsifier.parameter_groups(1e-3))
    before = {name: g.log_alpha.clone() for name, g in hard_concretes(detector).items()}
    for _ in range(6):
        loss = sparsifier.loss(sum(detector.train()(list(images), targets).values()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step()
    assert all(not torch.equal(g.log_alpha, before[name]) for name, g in hard_concretes(detector).items())
    small = sparsifier.finish([images])
    count = sparsereg.count(sparsifier.model, images)
    assert count.compacted_macs <= 0.5 * count.macs
    with torch.no_grad():
        for name, answer in Raw(detector.eval())(images).items():
            torch.testing.assert_close(small(images)[name], answer, rtol=1e-4, atol=1e-5)


def test_batches_without_what_the_example_has():
    with pytest.raises(ValueError, match=r"a batch \(x: float32 \(2, 6\)\) has not got what the example has"):
        like(torch.zeros(2, 6), {"x": torch.zeros(2, 6)})
