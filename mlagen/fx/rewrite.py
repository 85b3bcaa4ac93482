"""What the passes share: new nodes whose value is known, and graphs left in order."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._inductor.pattern_matcher import stable_topological_sort


class Writer:
    """Makes calls in front of a node, each once: equal calls are one node."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes]) or contextlib.nullcontext()
        self._made: dict[object, fx.Node] = {}
        self._calls: list[fx.Node] = []

    def emit(self, before: fx.Node, target: Any, *args: Any, shared: bool = False, **kwargs: Any) -> fx.Node:
        """A call and its value; with `shared`, one that an equal call made earlier will do for."""
        key = (target, repr(args), repr(sorted(kwargs.items())))
        if shared and key in self._made:
            return self._made[key]
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        self._calls.append(node)
        given = torch.fx.map_arg((args, kwargs), lambda each: each.meta["val"])
        with self.mode:
            node.meta["val"] = target(*given[0], **given[1])
        if shared:
            self._made[key] = node
        return node

    @contextlib.contextmanager
    def undoing(self) -> Iterator[None]:
        """Take away what is emitted in this context where it ends with an exception, which goes on."""
        before, made = len(self._calls), dict(self._made)
        try:
            yield
        except BaseException:
            for node in reversed(self._calls[before:]):
                self.graph.erase_node(node)
            del self._calls[before:]
            self._made = made
            raise


def finish(graph: fx.Graph, unused: Iterable[fx.Node]) -> None:
    """Sort a graph that was changed, take away what is unused now, and check it."""
    stable_topological_sort(graph)
    left = set(unused)
    for node in reversed(list(graph.nodes)):
        if node in left and not node.users:
            graph.erase_node(node)
    graph.lint()
