"""Products of two tensors summed over an axis: matrix products and einsum."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from sparsereg.compression.running import can_train
from sparsereg.compression.units.labels import FIRST, Grid, Ints, Labels, live, varying
from sparsereg.compression.units.program import Call, name_of
from sparsereg.compression.units.rules.grouped import of_scores, scores_of, selected, shares, values_of
from sparsereg.compression.units.rules.mixing import dense, product_with_weight
from sparsereg.compression.units.rules.stacked import letters_of, stack_of, stacked
from sparsereg.compression.units.rules.table import Dead, Labeller, Smaller, replaced, rule


def _product_call(cut: Smaller, node: fx.Node, a: dict[str, Any]) -> Call:
    """Of what several heads share, keys and values say, the part that the heads that are left read."""
    read = letters_of(cut.program, node)
    if read is None or any(source not in cut.labels for source, _ in read[:2]):
        return replaced(node)
    sources = [source for source, _ in read[:2]]
    for letter in dict.fromkeys(read[2]):
        axes = [letters.find(letter) for _, letters in read[:2]]
        if min(axes) < 0:
            continue
        wanted = [cut.alive_along(cut.labels[s], d) for (s, _), d in zip(read[:2], axes, strict=True)]
        if len(wanted[0]) == len(wanted[1]) and not torch.equal(*wanted):
            both = wanted[0] & wanted[1]
            sources = [selected(cut, s, d, both) for s, d in zip(sources, axes, strict=True)]
    if name_of(node) == "einsum":
        return replaced(node, tensors=sources)
    return Call(node.target, (*sources, *node.args[2:]), node.kwargs)


@rule("matmul", "bmm", "mm", "mv", "dot", call=_product_call)
def matmul(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels:
    """(..., m, k) times (..., k, n)."""
    stack = stack_of(x.program, node)
    if stack is not None:
        return stacked(x, node, stack)
    layer = product_with_weight(x, node)
    if layer is not None:
        weight, out, axis = layer
        return dense(x, node, node.args[0 if axis == -1 else 1], weight, None, out, 1 - out, axis)
    read = letters_of(x.program, node)
    assert read is not None
    return Product(x, node, read[:2], read[2]).labels()


@rule("einsum", call=_product_call)
def einsum(x: Labeller, node: fx.Node, a: dict[str, Any]) -> Labels | None:
    """Any product of two tensors."""
    stack = stack_of(x.program, node)
    if stack is not None:
        return stacked(x, node, stack)
    read = letters_of(x.program, node)
    if read is None:
        for operand in a["tensors"]:
            x.fix(operand, f"einsum {a['equation']}", node)
        return None
    return Product(x, node, read[:2], read[2]).labels()


Operand = tuple[Any, str]
"""A node, and a letter for each of its axes."""
Letters = set[str]


class Product:
    """The sum over k of left[..., k] right[..., k].

    Args:
        x: the labels so far.
        node: the operation.
        operands: both factors; letters in both are summed over unless they are in ``out``.
        out: letters of the result.

    Attributes:
        sides: labels of each factor, with its letters.
        dead: what the elements of a unit that is gone are, in each factor.
    """

    def __init__(self, x: Labeller, node: fx.Node, operands: tuple[Operand, Operand], out: str) -> None:
        self.x, self.node, self.name = x, node, name_of(node)
        self.sources, self.out = tuple(source for source, _ in operands), out
        self.shape = x.program.values[node].shape
        self.sides = [(self._labels_of(source), letters) for source, letters in operands]
        self.dead = [x.dead.get(source, Dead.ZERO) for source in self.sources]

    def labels(self) -> Labels:
        """Labels of the result."""
        self._only_together()
        varied = self._varied()
        summed = (varied[0] | varied[1]) - set(self.out)
        if summed:
            return self._summed(varied, summed)
        own = varied
        long = [{c for i, c in enumerate(letters) if labels.shape[i] > 1} for labels, letters in self.sides]
        both = (varied[0] | varied[1]) & long[0] & long[1]
        varied = [v | both for v in varied]  # what goes along an axis of one factor goes along the other's
        if all(varied) and not varied[0] <= varied[1] and not varied[1] <= varied[0]:
            zero = [dead is Dead.ZERO for dead in self.dead]
            if all(zero):
                return self._outer(varied)
            common = varied[0] & varied[1]
            for (labels, _), is_zero in zip(self.sides, zero, strict=True):
                if not (is_zero or common):
                    why = f"{self.name} reads it, and it is not zero when it is gone"
                    self.x.axes.fix(labels, why, self.node)
            own = varied = [v if z else v & common for v, z in zip(varied, zero, strict=True)]
        states = [dead for dead, v in zip(self.dead, own, strict=True) if v]
        self.x.dead[self.node] = min(states, default=Dead.ZERO)
        return self._passed(varied)

    def _labels_of(self, source: Any) -> Labels:
        x = self.x
        if isinstance(source, fx.Node) and source in x.program.weights:
            value = x.program.weights[source]
            if can_train(value) and value.numel() > 1_000_000:
                x.keep_weight(source, f"{self.name} reads it", self.node)
                return x.labels(None, tuple(value.shape))
        return x.labels(source)

    def _varied(self) -> list[Letters]:
        """The letters of the axes along which the units of each factor lie."""
        return [{letters[i] for i in varying(labels)} for labels, letters in self.sides]

    def _only_together(self) -> None:
        """A factor with units along the sum, where the other's lie elsewhere, goes as both do, or stays."""
        varied = self._varied()
        for i, (labels, letters) in enumerate(self.sides):
            other = varied[1 - i]
            if not (varied[i] - set(self.out) and other and other <= set(self.out)):
                continue
            common = "".join(sorted(varied[i] & other))
            if common:
                units = self._along(i, common)
                labels = _spread(np.ravel(units), common, letters, labels.shape, units.shape)
            else:
                why = f"{self.name} sums over it with what has units elsewhere"
                self.x.axes.fix(labels, why, self.node)
                labels = live(labels.shape)
            self.sides[i] = labels, letters

    def _along(self, side: int, order: str) -> Ints:
        """Labels of a factor as an array over letters, of size 1 where it lacks one."""
        labels, letters = self.sides[side]
        there = [letter for letter in order if letter in letters]
        axes = tuple(letters.index(letter) for letter in there)
        units = self.x.axes.reduce(labels, axes, self.name, self.node)
        return units.reshape(
            [labels.shape[letters.index(letter)] if letter in there else 1 for letter in order]
        )

    def _made(self, units: Ints, letters: str) -> Labels:
        """Labels of the result from an array over some of its letters."""
        return _spread(np.ravel(units), letters, self.out, self.shape, units.shape)

    # --- no units along the sum ---------------------------------------------------------------------------

    def _outer(self, varied: list[Letters]) -> Labels:
        """Units along an axis of each factor, as in k^T v: one of the product stays while both its own do."""
        x, why = self.x, f"{self.name} with what cannot go"
        common = _joined(varied[0] & varied[1])
        letters = common + "".join(_joined(v - set(common)) for v in varied)
        one, two = np.broadcast_arrays(*(self._along(side, letters) for side in (0, 1)))
        x.axes.fix(one[two < FIRST], why, self.node)
        x.axes.fix(two[one < FIRST], why, self.node)
        units = x.axes.both(np.ravel(one), np.ravel(two)).reshape(one.shape)
        if common:  # a head of one goes with that of the other
            rows = x.axes.sets.new(int(np.prod(one.shape[: len(common)])))
            x.axes.grids += [Grid(line.reshape(len(rows), -1), rows) for line in (one, two)]
            x.axes.heads += [(rows, False)] * (len(rows) > 1)
        x.through[self.node] = self.sources
        x.dead[self.node] = Dead.ZERO
        return self._made(units, letters)

    def _passed(self, varied: list[Letters]) -> Labels:
        """The result has the units of the factors."""
        large = 0 if varied[0] else 1
        if varied[0] and varied[1]:
            small, large = (0, 1) if varied[0] <= varied[1] else (1, 0)
            if not varied[small] <= varied[large]:
                return self._whole("has units along two of its axes")
            batch, inner = _joined(varied[small]), _joined(varied[large] - varied[small])
            made = self._tie_rows(small, batch, inner)
            if made is not None:
                return self._made(made, batch + inner)
        if not varied[large]:
            return live(self.shape)
        order = "".join(letter for letter in self.out if letter in varied[large])
        return self._made(self._along(large, order), order)

    def _tie_rows(self, small: int, batch: str, inner: str) -> Ints | None:
        """The scores of a head go with the values of that head; labels of what it makes of shared ones."""
        x = self.x
        rows = np.ravel(self._along(small, batch))
        units = self._along(1 - small, batch + inner).reshape(len(rows), -1)
        pair = of_scores(x, rows) if len(batch) == len(inner) == 1 else None
        if pair is not None and shares(x, units):
            return values_of(x, self.node, units, *pair)
        x.axes.fix(units[rows < FIRST], f"{self.name} with what cannot go", self.node)
        units, rows = units[rows >= FIRST], rows[rows >= FIRST]
        if inner and len(rows):
            x.axes.grids.append(Grid(units, rows))
        else:
            x.axes.equal(rows, np.ravel(units), self.name, self.node)
        return None

    def _whole(self, why: str) -> Labels:
        """Nothing of either factor goes."""
        for labels, _ in self.sides:
            self.x.axes.fix(labels, f"{self.name} {why}", self.node)
        return live(self.shape)

    # --- units along the sum ------------------------------------------------------------------------------

    def _summed(self, varied: list[Letters], summed: Letters) -> Labels:
        """Units lie along the sum: those of both factors go together."""
        x = self.x
        zero = [dead is Dead.ZERO for dead in self.dead]
        alone = [v - set(self.sides[1 - i][1]) for i, v in enumerate(varied)]
        if any(zero):
            x.reads.append(self.sources)
        elif not (varied[0] | varied[1]) - summed - alone[0] - alone[1]:
            return self._whole("sums over values that are not zero when it is gone")
        side = next((i for i in (0, 1) if alone[i] and not alone[1 - i]), None)
        if side is not None and all(zero):
            found = self._read_product(side, varied, alone[side], summed)
            if found is not None:
                return found
        varied = [v - a for v, a in zip(varied, alone, strict=True)]  # tied along axes of one factor alone
        batch, inner = _joined((varied[0] | varied[1]) - summed), _joined(summed)
        one, two = np.broadcast_arrays(*(self._along(side, batch + inner) for side in (0, 1)))
        scores = scores_of(x, one, two) if len(batch) == len(inner) == 1 else None
        if scores is not None:
            return self._made(scores, batch)
        x.axes.equal(one, two, f"{self.name} sums over it with what cannot go", self.node)
        return self._rows(one, two, batch, any(zero))

    def _rows(self, one: Ints, two: Ints, batch: str, zero: bool) -> Labels:
        """The result has a unit for each row of what was summed, as for each head; none without a batch."""
        x = self.x
        if not batch:
            x.dead[self.node] = Dead.ZERO
            return live(self.shape)
        sizes = one.shape[: len(batch)]
        if not zero:  # what is summed goes with its row, which is anything then
            flat = one.reshape(*sizes, -1)
            x.axes.equal(flat, flat[..., :1], self.name, self.node)
            x.dead[self.node] = Dead.ANYTHING
        rows = x.axes.sets.new(int(np.prod(sizes)))
        x.axes.grids.append(Grid(one.reshape(len(rows), -1), rows))
        firsts = [units.reshape(len(rows), -1)[:, 0] for units in (one, two)]
        x.axes.heads.append((rows, any(len(np.unique(first)) < len(rows) for first in firsts)))
        return self._made(rows.reshape(sizes), batch)

    def _read_product(
        self, side: int, varied: list[Letters], alone: Letters, summed: Letters
    ) -> Labels | None:
        """A sum over one of the axes along which a product of two factors has units, as q (k^T v).

        Args:
            side: which factor is the product.
            varied: letters along which the units of each lie.
            alone: those of the product only.
            summed: those of the sum.
        """
        x = self.x
        batch = _joined((varied[0] | varied[1]) - summed - alone)
        own, inner = _joined(alone), _joined(summed)
        many = self._along(side, batch + inner + own)
        middle = many.shape[len(batch) : len(batch + inner)]
        many = many.reshape(*many.shape[: len(batch)], -1, *many.shape[len(batch + inner) :])
        parts = x.axes.parts_of(many)
        if parts is None:
            return None
        read, made = sorted(parts, key=lambda part: bool((np.diff(part, axis=-1) != 0).any()))
        few = self._along(1 - side, batch + inner)
        few = np.broadcast_to(few, (*few.shape[: len(batch)], *middle)).reshape(*few.shape[: len(batch)], -1)
        read = read.reshape(*many.shape[: len(batch) + 1], -1)[..., 0]
        x.axes.equal(few, read, f"{self.name} sums over it with what cannot go", self.node)
        x.through[self.node] = (self.sources[side],)
        x.dead[self.node] = Dead.ZERO
        return self._made(np.asarray(made.take(0, axis=len(batch))), batch + own)


def _joined(letters: Letters) -> str:
    return "".join(sorted(letters))


def _spread(rows: Ints, batch: str, out: str, shape: torch.Size, sizes: tuple[int, ...]) -> Labels:
    order = sorted(range(len(batch)), key=lambda i: out.index(batch[i]))
    labels = torch.from_numpy(rows.reshape(sizes).transpose(order)).int()
    view = [sizes[batch.index(letter)] if letter in batch else 1 for letter in out]
    return labels.reshape(view).expand(shape)
