"""A compacted network in the class that its author wrote, where that can hold it.

Which arguments of the class belong to which sizes is found by trying: one argument is changed, the class is
built without memory for its weights, and the sizes that follow it are those that it decides on. What comes
out has to give the same answers.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.compact import compact
from sparsereg.compression.recipe import Build, Path, Recipe, Shapes, Values, recipes, shapes_of
from sparsereg.compression.running import first_line, tensors_in
from sparsereg.compression.solving import Solver, said
from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.verify import difference, in_float64
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes

log = logging.getLogger(__name__)

_NOT_SIZES = ("vocab", "token", "label", "class", "position", "layers", "depth", "chans", "image", "patch")
"""Parts of names of arguments that no gate changes."""
_DEPTHS = ("layer", "depth", "block")
"""Parts of names of arguments that may say how many layers there are."""
_QUERIES = ("q_proj", "query.", "q_lin", ".q.", "to_q", "wq")
_FUSED = ("qkv", "in_proj", "c_attn", "query_key_value")
"""Parts of names of weights that make queries, and of those that make them first of three."""
_SIZES = ("inner", "intermediate", "hidden", "ff", "dim", "size", "heads")
"""Parts of names of arguments that may be sizes where nothing is said."""
_TRIED = (16, 32)
"""Values of such an argument with which its class is tried."""
_TOLERANCE = 1e-6
"""Of the spread of the answers, in float64."""


def restore_class(
    network: nn.Module, original: nn.Module, example_input: Any, build: Build | None = None
) -> nn.Module:
    """Return a smaller network as an object of the class of the original one, with the right arguments.

    The class must be able to hold the shape: the same sizes in all layers that one argument decides on
    (``shape=uniform``). A model of transformers gets a configuration of its own, so that ``save_pretrained``
    and ``from_pretrained`` know it. Where attention's heads have become smaller, its scale is put into the
    weights of the queries.

    Args:
        network: with gates, or what ``compact`` made of it.
        original: the network without gates; left as it is.
        example_input: one batch as the network takes it.
        build: makes the original network, and others with arguments of its class by name, for instance
            ``functools.partial(timm.create_model, "vit_tiny_patch16_224", num_classes=10)``; known for
            models of transformers, timm and of classes that keep their arguments if None.

    Raises:
        InputError: the class cannot hold the shape; the layers that differ are named. Or the arguments of
            the original network are not known.

    Example:
        >>> from sparsereg import gate
        >>> from sparsereg.compression import compact
        >>> class Net(nn.Sequential):
        ...     def __init__(self, hidden=4):
        ...         super().__init__(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 2))
        >>> gated = gate(Net().eval(), torch.ones(1, 3))
        >>> _ = gated[0].gate.gates.log_alpha.data.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0]))
        >>> restore_class(gated, Net(), torch.ones(1, 3))[0]
        Linear(in_features=3, out_features=2, bias=True)
    """
    smaller = compact(network, example_input) if hard_concretes(network) else network
    if not isinstance(smaller, fx.GraphModule):
        raise ValueError("network must have gates, or be what compact() returned")
    restorer = Restorer(original, recipe_of(original, build), weights_left(smaller, original))
    return restorer.restored(smaller, example_input)


def recipe_of(original: nn.Module, build: Build | None) -> Recipe:
    """How a network was made: what gives its shapes, or does so with other numbers.

    Raises:
        InputError: it is not known.
    """
    own, alike, name = shapes_of(original), [], type(original).__name__
    for recipe in recipes(original, build):
        try:
            made = recipe.shapes({})
        except Exception:  # all kinds, of the class, which was made in another way
            continue
        if made == own:
            return recipe.given(_left_to_the_class(original, recipe, own))
        alike += [recipe] * (made.keys() == own.keys())
    for recipe in alike:
        try:
            return recipe.with_(Solver(name, recipe, own, recipe.numbers()).solved({}))
        except InputError:
            continue
    raise InputError(
        f"restore_class: the arguments that {name} was made with are not known: give build=, which makes it"
    )


def _left_to_the_class(original: nn.Module, recipe: Recipe, own: Shapes) -> dict[str, float]:
    """Arguments that a configuration leaves to the class, with the values that give the sizes it chose."""
    found = {}
    for name in _unsaid(original):
        try:
            tried = [recipe.given({name: value}).shapes({}) for value in _TRIED]
        except Exception:  # all kinds, of the class, which knows no such argument
            continue
        values = set(_implied(own, *tried))
        if len(values) == 1:
            found[name] = values.pop()
    return found


def weights_left(smaller: nn.Module, original: nn.Module) -> dict[str, Tensor]:
    """What is left of each parameter and buffer of the original network, by its name."""
    there = {**dict(smaller.named_parameters(remove_duplicate=False)), **dict(smaller.named_buffers())}
    found: dict[str, Tensor] = {}
    own = {**dict(original.named_parameters(remove_duplicate=False)), **dict(original.named_buffers())}
    by_object: dict[int, str] = {}
    for name, value in own.items():
        first = by_object.setdefault(id(value), name)
        for known in (name, name.replace(".", "_"), first, first.replace(".", "_")):
            if known in there:
                found[name] = there[known].detach()
                break
    return found


class Restorer:
    """Makes a network of a class with the shapes of what is left.

    Args:
        original: the network that was gated.
        recipe: how it was made.
        wanted: what is left of its weights.
    """

    def __init__(self, original: nn.Module, recipe: Recipe, wanted: dict[str, Tensor]) -> None:
        self.original = original
        self.name = type(original).__name__
        self.recipe = recipe
        self.wanted, shorter = _without_layers(wanted, original)
        numbers = recipe.numbers()
        self.start = {k: v for k, v in numbers.items() if not _says(k, _NOT_SIZES)}
        self.depths = self._depths({k: v for k, v in numbers.items() if _says(k, _DEPTHS)}, shorter)
        lost = [n for n in recipe.shapes(self.depths) if n not in self.wanted]
        if lost:
            raise InputError(
                f"restore_class: {self.name} cannot be without {lost[0]}"
                f"{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}, which is gone with its branch"
            )
        shapes = {n: tuple(v.shape) for n, v in self.wanted.items()}
        self.solver = Solver(self.name, recipe, shapes, self.start)

    def _depths(self, numbers: Values, shorter: Mapping[str, int]) -> Values:
        """Numbers of layers, where whole ones are gone: found by leaving one out."""
        found: Values = {}
        full = self.recipe.shapes({}).keys()
        for key, value in numbers.items() if shorter else ():
            try:
                lost = full - self.recipe.shapes({key: value - 1}).keys()
            except Exception:  # all kinds, of the class
                continue
            lists = {path for path in shorter for name in lost if name.startswith(f"{path}.")}
            steps = {shorter[path] for path in lists}
            if len(steps) == 1:
                found[key] = value - steps.pop()
        return found

    def of(self, wanted: Mapping[str, Tensor]) -> Restorer:
        """The same for other weights of the same names, of which no layer is gone."""
        other = copy.copy(self)
        other.wanted = {name: value for name, value in wanted.items() if name in self.wanted}
        other.solver = self.solver.of({name: tuple(value.shape) for name, value in other.wanted.items()})
        return other

    def arguments(self) -> Values:
        """Arguments with which the class has the shapes, whatever it answers.

        Raises:
            InputError: there are none.
        """
        return self.solver.solved(self.depths)

    def restored(self, smaller: nn.Module, example: Any) -> nn.Module:
        """A network of the class with the same answers.

        Args:
            smaller: what is left of the original network.
            example: one batch as it takes it.

        Raises:
            InputError: the class has none.
        """
        reasons: list[InputError] = []
        for values in self.candidates(reasons):
            try:
                return self.made(values, smaller, example)
            except InputError as error:
                reasons.append(error)
        raise reasons[0]

    def candidates(self, reasons: list[InputError]) -> Iterator[Values]:
        """Arguments to try: as many heads as there were, or fewer; why some are none is noted."""
        heads = [k for k, v in self.start.items() if "head" in str(k[0]) and "dim" not in str(k[0]) and v > 1]
        most = int(max((self.start[k] for k in heads), default=1))
        for number in range(most, 0, -1):
            fixed = {k: max(1.0, self.start[k] * number / most) for k in heads}
            if any(v != int(v) for v in fixed.values()):
                continue
            try:
                yield self.solver.solved(self.depths | (fixed if number < most else {}))
            except InputError as error:
                reasons.append(error)

    def made(self, values: Values, smaller: nn.Module, example: Any) -> nn.Module:
        """The network, if it gives the same answers."""
        network = self.built(values).to(next(iter(self.wanted.values())).device)
        here = network.state_dict()
        fits = {n: v for n, v in self.wanted.items() if n in here and here[n].shape == v.shape}
        network.load_state_dict({**here, **fits})
        network.eval()
        try:
            off = _difference(network, smaller, example)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputError(
                f"restore_class: {self.name} with {said(values)} has the shape but does not run:"
                f" {first_line(error)}; keep what compact() returned"
            ) from None
        if off > _TOLERANCE:
            _scale_queries_(network, self.original)
            off = _difference(network, smaller, example)
        if off > _TOLERANCE:
            raise InputError(
                f"restore_class: {self.name} has the shape but gives other answers, by {off:.1g} of their"
                " spread; keep what compact() returned"
            )
        log.info("%s with %s gives the same answers", self.name, said(values) or "its own arguments")
        return network.train(self.original.training)

    def built(self, values: Values) -> nn.Module:
        """An object of the class with some arguments changed.

        Raises:
            InputError: the class refuses them, or other arguments cannot be had again.
        """
        try:
            network: nn.Module = self.recipe.build(values)
        except Exception as error:  # all kinds, of the class
            raise InputError(
                f"restore_class: {self.name} cannot be made with {said(values) or 'its own arguments'}:"
                f" {first_line(error)}; keep what compact() returned"
            ) from None
        return network


def _says(key: Path, words: tuple[str, ...]) -> bool:
    return any(word in part for word in words for part in key if isinstance(part, str))


def _without_layers(
    wanted: dict[str, Tensor], original: nn.Module
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Weights under the names that they have when whole layers of a list are gone, and how many those are."""
    shorter: dict[str, int] = {}
    for path, module in original.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len({type(m) for m in module}) != 1:
            continue
        places = {n: [f"{path}.{n}.{p}" for p, _ in m.named_parameters()] for n, m in module.named_children()}
        gone = [n for n, own in places.items() if own and not any(p in wanted for p in own)]
        if not gone or len(gone) == len(places) or not all(n.isdecimal() for n in places):
            continue
        left = [n for n in places if n not in gone]
        shorter[path] = len(gone)
        wanted = {
            name if new is None else f"{path}.{new}{name[len(f'{path}.{old}') :]}": value
            for name, value in wanted.items()
            for old, new in [_moved(name, path, left)]
            if old not in gone
        }
    return wanted, shorter


def _moved(name: str, path: str, left: list[str]) -> tuple[str, str | None]:
    """In which layer of a list a weight lies, and the number that this has among those that are left."""
    if not name.startswith(f"{path}."):
        return "", None
    old = name[len(path) + 1 :].partition(".")[0]
    return old, str(left.index(old)) if old in left else None


@torch.no_grad()
def _difference(network: nn.Module, smaller: nn.Module, example: Any) -> float:
    """Largest difference of the answers in float64, as a share of their spread."""
    args, kwargs = inputs_of(example)
    one, two = (tensors_in(in_float64(n, args, kwargs)) for n in (network, smaller))
    if [a.shape for a in one] != [b.shape for b in two]:
        return math.inf
    return max((difference(b, a) for a, b in zip(one, two, strict=True)), default=0.0)


@torch.no_grad()
def _scale_queries_(network: nn.Module, original: nn.Module) -> None:
    """Multiply what makes queries, so that scores have the scale of heads of the original size."""
    one, two = _head_size(network), _head_size(original)
    if not one or not two or one == two:
        return
    factor = math.sqrt(one / two)
    for name, value in network.named_parameters():
        if any(part in f".{name}" for part in _FUSED):
            axis = value.dim() - 1 if "c_attn" in name else 0
            value.narrow(axis, 0, value.shape[axis] // 3).mul_(factor)
        elif any(part in f".{name}" for part in _QUERIES):
            value.mul_(factor)


def _head_size(network: nn.Module) -> int:
    for module in network.modules():
        for name in ("head_dim", "attention_head_size"):
            size = getattr(module, name, None)
            if isinstance(size, int):
                return size
    return 0


def _unsaid(original: nn.Module) -> Iterator[str]:
    """Names of sizes that a configuration leaves to the class."""
    config: Any = getattr(original, "config", None)
    if not hasattr(config, "to_dict"):
        return
    known = config.to_dict()
    wanted = [n for n, value in known.items() if value is None and any(part in n for part in _SIZES)]
    yield from dict.fromkeys([*wanted, *(n for n in ("head_dim",) if known.get(n) is None)])


def _implied(own: dict[str, tuple[int, ...]], *tried: dict[str, tuple[int, ...]]) -> Iterator[float]:
    """What an argument would have to be for the sizes that a network has, from those of two others."""
    one, two = tried
    for name, shape in own.items():
        for d, size in enumerate(shape):
            slope = (two[name][d] - one[name][d]) / (_TRIED[1] - _TRIED[0])
            if slope:
                yield round(_TRIED[0] + (size - one[name][d]) / slope, 6)
