"""Files that were made to do harm: each ends as a network or as one line, and nothing of it runs."""

import copy
import json
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sparsereg.compression import compact, load_compacted, save_compacted, storage, vocabulary
from sparsereg.data.form import Form
from sparsereg.errors import InputError
from sparsereg.training.build import restore
from sparsereg.training.checkpoint import Checkpoint
from tests.compression.networks import make, set_gates

PROBE = "sparsereg_hostile_probe"
"""A module that a payload imports; it is never there unless code of a file has run."""
PAYLOAD = f"__import__('sys').modules.__setitem__('{PROBE}', 1)"
TEXTS = (
    f"x={PAYLOAD}",
    PAYLOAD,
    f"a\n    {PAYLOAD}\n",
    f'a"), {PAYLOAD}, getattr(self, "training',
    f"*a, b={PAYLOAD}",
    f"a: {PAYLOAD}",
    f"a = 1, {PAYLOAD},",
    "__class__",
    "__init__.__globals__",
    "",
    "self",
    "lambda",
    "x" * 100_000,
    "os.system",
    "torch.load",
    "ﬁ",
)
NUMBERS = (10**30, -(10**30), 2**63, 2**40, -1, 0, 1.5, 1e308, float("nan"), float("inf"), True, None)
OTHERS = ([], {}, {"node": "x"}, {"tuple": [{"node": 3}]}, {"dict": [[1]]}, {"slice": []}, {"dtype": "load"})


@pytest.fixture(scope="module")
def sound():
    """A structure with everything in it, and its weights."""
    network, x = make("residual")
    set_gates(network, "mixed")
    smaller = compact(network, x, check=False)
    return json.loads(storage.describe(smaller)), smaller.state_dict()


@pytest.fixture(autouse=True)
def nothing_runs():
    yield
    assert PROBE not in sys.modules


def places(value, path=()):
    """Every place in a JSON value, keys of objects included."""
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*path, key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from places(part, (*path, i))


def at(value, path):
    for step in path:
        value = value[step]
    return value


def put(value, path, new):
    """A copy with something else at a place."""
    if not path:
        return new
    value = copy.deepcopy(value)
    at(value, path[:-1])[path[-1]] = new
    return value


def rename(value, path, new):
    """A copy in which an object has another key."""
    value = copy.deepcopy(value)
    owner = at(value, path[:-1])
    owner[new] = owner.pop(path[-1])
    return value


def network_or_one_line(plan, weights):
    """Build it: a network, whose source holds no word of the payload, or an InputError of one line."""
    text = plan if isinstance(plan, str) else json.dumps(plan)
    try:
        network = storage.rebuild(text, weights)
    except InputError as error:
        message = str(error)
    else:
        message = ""
        assert "__import__" not in network.code
    assert "\n" not in message
    assert len(message) < 1000


def kinds(plan):
    """One place for each kind of field: the steps are all alike."""
    found = {}
    for path in places(plan):
        value = at(plan, path)
        general = tuple("i" if isinstance(p, int) else p for p in path)
        if path[:1] == ("modules",) and len(path) > 1:
            general = ("modules", "PATH", *path[2:])
        if path[:1] == ("nodes",) and len(path) > 2:
            general = ("nodes", plan["nodes"][path[1]][0], path[2], *general[3:])
        found.setdefault((general, type(value)), path)
    return list(found.values())


def names_of_kinds():
    network, x = make("residual")
    set_gates(network, "mixed")
    plan = json.loads(storage.describe(compact(network, x, check=False)))
    return kinds(plan)


@pytest.mark.parametrize("path", names_of_kinds(), ids=str)
def test_every_field_replaced(sound, path):
    plan, weights = sound
    for evil in (*TEXTS, *NUMBERS, *OTHERS):
        network_or_one_line(put(plan, path, evil), weights)
    if path and isinstance(path[-1], str):
        for evil in TEXTS:
            network_or_one_line(rename(plan, path, evil), weights)


@pytest.mark.parametrize("evil", TEXTS)
def test_names_that_are_none_are_refused(sound, evil):
    plan, weights = sound
    steps = plan["nodes"]
    first = next(i for i, s in enumerate(steps) if s[0] == "call_module")
    function = next(i for i, s in enumerate(steps) if s[0] == "call_function")
    layer = next(iter(plan["modules"]))
    for path in [("name",), ("nodes", 0, 1), ("nodes", 0, 2), ("nodes", first, 2), ("nodes", function, 2)]:
        with pytest.raises(InputError):
            storage.rebuild(json.dumps(put(plan, path, evil)), weights)
    with pytest.raises(InputError):
        storage.rebuild(json.dumps(rename(plan, ("modules", layer), evil)), weights)
    with pytest.raises(InputError):
        storage.rebuild(json.dumps(put(plan, ("modules", layer, "class"), evil)), weights)
    arguments = put(plan, ("nodes", function, 4), {"dict": [[evil, 1]]})
    with pytest.raises(InputError):
        storage.rebuild(json.dumps(arguments), weights)
    with pytest.raises(InputError):
        storage.rebuild(json.dumps(plan), {**weights, evil: torch.zeros(1)})
    output = put(plan, ("nodes", len(steps) - 1, 3), {"tuple": [evil]})
    if evil != "":
        with pytest.raises(InputError):
            storage.rebuild(json.dumps(output), weights)


@pytest.mark.parametrize(
    "evil",
    [
        "graph",
        "code",
        "forward",
        "_parameters",
        "conv.__class__",
        "conv.forward",
        "a." * 100 + "a",
        'conv"), evil("',
        "conv..bias",
        "1e5",
    ],
)
def test_paths_that_are_none_are_refused(sound, evil):
    plan, weights = sound
    layer = next(iter(plan["modules"]))
    with pytest.raises(InputError, match="plain name|every network has"):
        storage.rebuild(json.dumps(rename(plan, ("modules", layer), evil)), weights)


def test_what_asks_for_more_than_it_brings_is_refused():
    x = [["placeholder", "x", "x", {"tuple": []}, {"dict": []}]]
    end = [["output", "output", "output", {"tuple": [{"node": "y"}]}, {"dict": []}]]

    def plan(step, modules=None):
        return json.dumps(
            {"name": "N", "modules": modules or {}, "parameters": {}, "nodes": [*x, step, *end]}
        )

    def function(name, *args, **kwargs):
        args = [{"node": "x"}, *args]
        return [
            "call_function",
            "y",
            name,
            {"tuple": args},
            {"dict": [[k, v] for k, v in kwargs.items()]},
        ]

    def layer(cls, **arguments):
        step = ["call_module", "y", "l", {"tuple": [{"node": "x"}]}, {"dict": []}]
        return plan(step, {"l": {"class": cls, "settings": arguments}})

    huge = 10**6
    for step in (
        function("F.pad", {"tuple": [huge, huge]}),
        function("F.interpolate", scale_factor=1e9),
        function("F.interpolate", size={"tuple": [huge, huge]}),
        function("F.adaptive_avg_pool2d", {"tuple": [huge, huge]}),
        function("operator.mul", {"list": [1] * 100}),
        function("operator.pow", 10**7),
    ):
        with pytest.raises(InputError):
            storage.rebuild(plan(step), {})
    for text in (
        layer("Linear", in_features=huge, out_features=huge),
        layer("Linear", in_features=10**30, out_features=huge),
        layer("LSTM", input_size=1, hidden_size=1, num_layers=10**9),
        layer("Upsample", scale_factor=1e9),
        layer("ZeroPad2d", padding=huge),
        layer("Conv2d", in_channels=1, out_channels=1, kernel_size={"tuple": [huge, huge]}),
        layer("Sequential"),
        layer("Transformer", num_encoder_layers=10**9),
        layer("Embedding", num_embeddings=huge, embedding_dim=huge),
    ):
        with pytest.raises(InputError):
            storage.rebuild(text, {})
    assert storage.rebuild(plan(function("F.pad", {"tuple": [1, 1]})), {})(torch.ones(1, 1)).shape == (1, 3)


def test_tensors_that_claim_more_than_they_hold_are_refused(sound):
    plan, weights = sound
    name = "head.weight"
    for evil in (
        torch.zeros(1).expand(10**12),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(10**6, device="meta"),
        torch.zeros(3),
        torch.zeros(weights[name].shape, dtype=torch.int64),
        "text",
        3,
        None,
    ):
        with pytest.raises(InputError):
            storage.rebuild(json.dumps(plan), {**weights, name: evil})
    with pytest.raises(InputError, match="lacks the weights"):
        storage.rebuild(json.dumps(plan), {k: v for k, v in weights.items() if k != name})
    with pytest.raises(InputError):
        storage.rebuild(json.dumps(plan), [1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(sound, value):
    plan, weights = sound
    name = next(name for name in plan["parameters"] if weights[name].is_floating_point())
    evil = torch.full_like(weights[name], value)
    with pytest.raises(InputError, match=f"{name!r} holds numbers that are not finite"):
        storage.rebuild(json.dumps(plan), {**weights, name: evil})


def test_a_mask_may_hold_infinity(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -float("inf"), 0.0]))

        def forward(self, x):
            return (x + self.mask).softmax(-1)

    x = torch.randn(2, 3)
    small = compact(Masked(), x)
    again = storage.load_compacted(storage.save_compacted(small, tmp_path / "masked.pt"))
    assert torch.equal(again(x), small(x))
    assert not again(x)[:, 1].any()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        '{"a":' * 50_000,
        "1" * 10_000,
        "null",
        "[]",
        "{}",
        '{"name": "N", "modules": {}, "nodes": [], "parameters": {}}',
        None,
        3,
    ],
)
def test_what_is_no_structure_is_refused(text):
    with pytest.raises(InputError) as caught:
        storage.rebuild(text, {})
    assert "\n" not in str(caught.value)


@pytest.mark.costly
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_structures_end_as_a_network_or_one_line(sound, data):
    plan, weights = sound
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(plan))))
        if not path:
            continue
        old = data.draw(st.sampled_from(list(places(plan))))
        what = data.draw(st.sampled_from(("replace", "move", "drop", "twice")))
        owner = at(plan, path[:-1])
        if what == "replace":
            plan = put(plan, path, data.draw(st.sampled_from((*TEXTS, *NUMBERS, *OTHERS)) | st.integers()))
        elif what == "move":
            plan = put(plan, path, copy.deepcopy(at(plan, old)))
        elif what == "drop":
            plan = copy.deepcopy(plan)
            del at(plan, path[:-1])[path[-1]]
        elif isinstance(owner, list):
            plan = put(plan, path[:-1], [*owner, owner[path[-1]]])
    network_or_one_line(plan, weights)


def test_a_file_that_carries_code_is_refused_and_named(tmp_path):
    network, x = make("mlp")
    path = save_compacted(compact(network, x), tmp_path / "c.pt")
    content = torch.load(path, weights_only=True)
    plan = json.loads(content["plan"])
    plan["nodes"][0][2] = f"x={PAYLOAD}"
    torch.save({**content, "plan": json.dumps(plan)}, path)
    with pytest.raises(InputError, match=r"c\.pt is no network that this version can read: an input"):
        load_compacted(path)
    for key in ("plan", "notes", "weights"):
        torch.save({**content, key: 3}, path)
        with pytest.raises(InputError, match=r"c\.pt"):
            load_compacted(path)


def test_a_checkpoint_that_carries_code_is_refused_and_named(sound, tmp_path):
    """What fine-tuning stores is read like a file of a compacted network."""
    plan, weights = sound
    for path, evil in ((("nodes", 0, 2), f"x={PAYLOAD}"), (("name",), PAYLOAD), (("modules",), 3)):
        checkpoint = Checkpoint(
            named="ckpt_path=tuned.ckpt",
            path=tmp_path / "tuned.ckpt",
            weights=weights,
            config={},
            form=Form(num_classes=4, image_shape=(3, 8, 8)),
            gated=False,
            epoch=1,
            content={},
            structure=json.dumps(put(plan, path, evil)),
        )
        with pytest.raises(InputError, match=r"^ckpt_path=tuned\.ckpt: its network cannot be read: "):
            restore(checkpoint)


def test_every_argument_of_every_class_has_a_kind():
    for name, arguments in vocabulary.CLASSES.items():
        for argument in arguments:
            assert argument in vocabulary.ARGUMENTS, (name, argument)
        assert issubclass(getattr(nn, name), nn.Module)


@pytest.mark.parametrize(
    ("make_layer", "shape"),
    [
        (lambda: nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True), (2, 5, 4)),
        (lambda: nn.GRU(4, 6, bias=False, batch_first=True), (2, 5, 4)),
        (lambda: nn.RNN(4, 6, nonlinearity="relu", batch_first=True), (2, 5, 4)),
        (lambda: nn.LayerNorm(4), (2, 5, 4)),
        (lambda: nn.GroupNorm(2, 4), (2, 4, 5)),
        (lambda: nn.PixelShuffle(2), (2, 4, 5, 5)),
        (lambda: nn.ConstantPad2d(1, float("-inf")), (2, 4, 5, 5)),
        (lambda: nn.InstanceNorm2d(4, affine=True), (2, 4, 5, 5)),
        (lambda: nn.Softmax(1), (2, 4)),
    ],
)
def test_layers_without_a_rule_are_kept_in_files(make_layer, shape, tmp_path):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make_layer()

        def forward(self, x):
            y = self.layer(x)
            return y[0] if isinstance(self.layer, nn.RNNBase) else y

    torch.manual_seed(0)
    network, x = Around().eval(), torch.randn(shape)
    loaded = load_compacted(save_compacted(compact(network, x), tmp_path / "c.pt"))
    assert torch.equal(loaded(x), network(x))
