"""Walking through a traced network operation by operation, with only what is still needed in memory."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsereg.compression.units.explain import inputs_of
from sparsereg.compression.units.program import op_name


class Running(fx.Interpreter):
    """Runs a traced network, its max pools over maps in the layout for which PyTorch's kernel is quick.

    On a CPU that for maps whose channels lie one after the other is up to 15 times slower than that for
    channels last, for the same numbers; between the two a map is copied twice.
    """

    def run_node(self, n: fx.Node) -> Any:
        """Run an operation."""
        source = n.args[0] if n.args else None
        if not isinstance(source, fx.Node) or not _pools(self.module, n):
            return super().run_node(n)
        x = self.env[source]
        if not isinstance(x, Tensor) or x.dim() != 4 or x.device.type != "cpu" or not x.is_contiguous():
            return super().run_node(n)
        self.env[source] = x.contiguous(memory_format=torch.channels_last)
        try:
            return super().run_node(n).contiguous()
        finally:
            self.env[source] = x


def _pools(module: nn.Module, node: fx.Node) -> bool:
    """Whether an operation is a max pool that gives a tensor."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        return type(layer) is nn.MaxPool2d and not layer.return_indices
    return node.op == "call_function" and op_name(node.target) == "max_pool2d"


class Route:
    """The operations of a network in order, and when each result is needed for the last time.

    Args:
        module: in eval mode.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes = list(module.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.done: list[list[fx.Node]] = [[] for _ in self.nodes]
        for node in self.nodes:
            last = max((self.place[user] for user in node.users), default=self.place[node])
            self.done[last].append(node)

    def start(self, inputs: Any) -> "Walk":
        """A batch in front of the first operation; see ``Walk``."""
        return Walk(self, inputs)

    def arguments(self, inputs: Any) -> list[Any]:
        """What the placeholders are given, in order."""
        args, kwargs = inputs_of(inputs)
        given = list(args)
        for node in [n for n in self.nodes if n.op == "placeholder"][len(given) :]:
            default = node.args[0] if node.args else None
            given.append(kwargs.get(str(node.target), default))
        return given


class Walk:
    """One batch on its way through a network.

    The weights may change while it is on its way: those behind it have been read, those in front have not.

    Args:
        route: through the network.
        inputs: the batch, as the network takes it.
    """

    def __init__(self, route: Route, inputs: Any) -> None:
        self._route = route
        self._next = 0
        self._run = Running(route.module, garbage_collect_values=False)
        self._run.args_iter = iter(route.arguments(inputs))

    def before(self, node: fx.Node, source: fx.Node) -> Tensor:
        """Walk up to an operation and return one of its inputs."""
        self._to(self._route.place[node])
        value: Tensor = self._run.env[source]
        return value

    def after(self, node: fx.Node) -> Tensor:
        """Walk over an operation and return what it gives; it must not have been walked over before."""
        self._to(self._route.place[node])
        value: Tensor = self._step()
        return value

    def answer(self) -> Any:
        """Walk over all operations that are left and return what the network answers."""
        self._to(len(self._route.nodes) - 1)
        return self._step()

    def peak(self) -> int:
        """Walk over all operations that are left; return the bytes that results of them took at once."""
        largest = 0
        while self._next < len(self._route.nodes):
            self._step()
            held = (_bytes(v) for n, v in self._run.env.items() if n.op != "get_attr")
            largest = max(largest, sum(held))
        return largest

    def _to(self, place: int) -> None:
        while self._next < place:
            self._step()

    @torch.no_grad()
    def _step(self) -> Any:
        node, env = self._route.nodes[self._next], self._run.env
        value = env[node] = self._run.run_node(node)
        for done in self._route.done[self._next]:
            del env[done]
        self._next += 1
        return value


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
