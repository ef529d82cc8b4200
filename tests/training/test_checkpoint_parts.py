"""A checkpoint with a part missing or of another kind is refused in one line, before anything is made."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

NETWORK = ["model=lenet300", "trainer.max_epochs=1", "target_sparsity=0.5", "ema_decay=0.5"]
COMMANDS = [
    ("test",),
    ("train", "trainer.max_epochs=1"),
    ("train", "resume_training=true", "trainer.max_epochs=2"),
]


@pytest.fixture
def trained(trained_once, tiny):
    return trained_once(*tiny, *NETWORK)


def refused(outcome) -> bool:
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    return outcome.code == 2 and len(errors) == 1 and "Traceback" not in outcome.err


def first(state: dict[str, Any]) -> str:
    return next(key for key, value in state.items() if value.is_floating_point() and value.dim() == 2)


def put(value: Any):
    return lambda state, key: state.__setitem__(key, value)


WEIGHTS = [
    lambda s: s.pop(first(s)),
    lambda s: s.update(new=torch.ones(1)),
    lambda s: s.update({first(s): s[first(s)][:, :1].clone()}),
    lambda s: s.update({first(s): s[first(s)].int()}),
    lambda s: s.update({first(s): torch.full_like(s[first(s)], float("nan"))}),
    lambda s: s.update({first(s): torch.full_like(s[first(s)], float("inf"))}),
    lambda s: s.update({first(s): "text"}),
    lambda s: s.update({first(s): None}),
    lambda s: s.update({3: torch.ones(1)}),
    lambda s: s.clear(),
    lambda s: [s.pop(k) for k in list(s) if "log_alpha" in k],
]


@pytest.mark.costly
def test_weights_that_do_not_fit(run, trained, tmp_path):
    content = torch.load(trained.last, weights_only=True)
    path = tmp_path / "changed.ckpt"
    for number, change in enumerate(WEIGHTS):
        other = copy.deepcopy(content)
        change(other["state_dict"])
        torch.save(other, path)
        for name, *arguments in COMMANDS:
            outcome = run(name, f"ckpt_path={path}", *arguments)
            assert refused(outcome) or (name == "train" and number == len(WEIGHTS) - 1), (number, outcome.err)


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a checkpoint but single tensors of a kind of which one is enough."""
    if isinstance(node, dict | list):
        items = list(node.items() if isinstance(node, dict) else enumerate(node))
        if path and path[-1] in ("state_dict", "current_model_state", "state") and len(items) > 1:
            items = items[:1]
        for key, value in items:
            yield (*path, key)
            yield from places(value, (*path, key))


def changed(content: dict, path: tuple, change) -> dict:
    other = copy.deepcopy(content)
    holder = other
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return other


CHANGES = {
    "missing": lambda holder, key: holder.pop(key),
    "text": put("text"),
    "null": put(None),
    "negative": put(-1),
    "list": put([]),
    "settings": put({}),
    "tensor": put(torch.tensor(float("nan"))),
}
QUICK = ("missing", "text")


def skipped(path: tuple) -> bool:
    """What test_checkpoint_settings covers."""
    return path[:2] == ("sparsereg", "config") and len(path) > 3


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_any_place_may_be_wrong(run, trained, tmp_path, change):
    check(run, trained, tmp_path, change, slice(None))


@pytest.mark.costly
@pytest.mark.parametrize("change", QUICK)
def test_some_places_may_be_wrong(run, trained, tmp_path, change):
    check(run, trained, tmp_path, change, slice(None, None, 46))


def check(run, trained, tmp_path, change, some) -> None:
    """Resume from a changed checkpoint: refused in one line, or nothing of what was changed matters."""
    content = torch.load(trained.last, weights_only=True)
    path = tmp_path / "changed.ckpt"
    where = [p for p in places(content) if not skipped(p)]
    assert len(where) > 100
    for place in where[some]:
        torch.save(changed(content, place, CHANGES[change]), path)
        outcome = run("train", f"ckpt_path={path}", *COMMANDS[2][1:])
        assert outcome.code == 0 or refused(outcome), (place, outcome.err[-600:])


@pytest.mark.costly
@pytest.mark.parametrize("name", [{}, [], None, torch.tensor(1.0)])
def test_groups_of_parameters_have_names(run, trained, tmp_path, name):
    content = torch.load(trained.last, weights_only=True)
    content["optimizer_states"][0]["param_groups"][-1]["name"] = name
    torch.save(content, tmp_path / "changed.ckpt")
    outcome = run("train", f"ckpt_path={tmp_path / 'changed.ckpt'}", *COMMANDS[2][1:])
    assert refused(outcome), outcome.err
    assert "param_groups" in outcome.err


def test_no_moment_of_an_optimizer_is_null(run, trained, tmp_path):
    content = torch.load(trained.last, weights_only=True)
    content["optimizer_states"][0]["state"][0]["exp_avg"] = None
    torch.save(content, tmp_path / "changed.ckpt")
    outcome = run("train", f"ckpt_path={tmp_path / 'changed.ckpt'}", *COMMANDS[2][1:])
    assert refused(outcome), outcome.err
    assert "exp_avg" in outcome.err
