"""Gates for a network that is to have some, and whether it answers as its task expects."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsereg.data.batches import call, tensor_of
from sparsereg.data.form import Form
from sparsereg.errors import InputError


def with_gates(net: nn.Module, form: Form, said: str, gates: dict[str, Any]) -> nn.Module:
    """Return a network with gates on what can go.

    Args:
        net: without gates.
        form: what it reads.
        said: setting that names it, for messages.
        gates: their settings.

    Raises:
        InputError: nothing of it can be gated, or it cannot be traced.
    """
    from sparsereg.compression import gate

    try:
        return gate(net, form.taken_by(net).example(), **gates)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{said}: cannot be gated: {error}; without_using_gate=true trains it without gates"
        ) from error


def check_answer(net: nn.Module, form: Form, said: str) -> None:
    """Raise an InputError unless a network answers to an example of the data as the task expects it."""
    training = net.training
    try:
        with torch.no_grad():
            answer = tensor_of(call(net.eval(), form.taken_by(net).example(2)))
    except InputError as error:
        raise InputError(f"{said}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{said}: cannot read {_read(form)}: {_too_long(net, form) or reason}") from error
    finally:
        net.train(training)
    if form.answer_shape is None:
        return
    expected = (2, *form.answer_shape)
    if not isinstance(answer, Tensor) or not _fits(tuple(answer.shape), expected, form.task):
        found = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise InputError(
            f"{said}: expected logits of shape {expected} for two {_noun(form)}, as task={form.task} needs"
            f" them, got {found}"
        )
    if form.task == "language_model":
        _check_causal(net, form, said)


@torch.no_grad()
def _check_causal(net: nn.Module, form: Form, said: str) -> None:
    """Raise an InputError if a language model's answers depend on the tokens that it is to predict."""
    inputs = form.taken_by(net).example(2)
    tokens = inputs if isinstance(inputs, Tensor) else next(v for k, v in inputs.items() if "mask" not in k)
    if tokens.shape[1] < 2 or not form.vocabulary or form.vocabulary < 2:
        return
    tokens[1, -1] = 1
    training = net.training
    first, second = tensor_of(call(net.eval(), inputs))[:, :-1]
    net.train(training)
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-5):
        raise InputError(
            f"{said}: its answer at a place depends on tokens behind it, which task=language_model lets it "
            "predict: its attention has to be causal"
        )


def _fits(found: tuple[int, ...], expected: tuple[int, ...], task: str) -> bool:
    """Whether an answer has the right shape; masks may be answered on a coarser grid."""
    if task == "segmentation":
        return len(found) == len(expected) and found[:2] == expected[:2]
    return found == expected


def _too_long(net: nn.Module, form: Form) -> str | None:
    """Say that texts are longer than what a network of Hugging Face has positions for, if they are."""
    positions = getattr(getattr(net, "config", None), "max_position_embeddings", None)
    if form.vocabulary is None or not isinstance(positions, int) or positions >= form.image_shape[0]:
        return None
    return (
        f"its max_position_embeddings={positions} are fewer than data.context={form.image_shape[0]}: give"
        f" data.context={positions}, or a network with more"
    )


def _noun(form: Form) -> str:
    return "texts" if form.vocabulary is not None else "images"


def _read(form: Form) -> str:
    if form.inputs is not None:
        return f"inputs by name, {', '.join(form.inputs)}"
    return f"{_noun(form)} of shape {form.image_shape}"
