"""What the passes share: new nodes whose value is known, and graphs left in order."""

import contextlib
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._inductor.pattern_matcher import stable_topological_sort

from mlagen.errors import MlagenError
from mlagen.fx.index import Unreadable
from mlagen.fx.known import untouched
from mlagen.fx.mutation import functional_call
from mlagen.fx.nodes import is_call

aten = torch.ops.aten
EMPTY = (aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default)


class Writer:
    """Makes calls in front of a node, each once: equal calls are one node."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes]) or contextlib.nullcontext()
        self._made: dict[object, fx.Node] = {}
        self._calls: list[fx.Node] = []

    def emit(self, before: fx.Node, target: Any, *args: Any, shared: bool = False, **kwargs: Any) -> fx.Node:
        """A call and its value; with `shared`, one that an equal call made earlier will do for.  Raises Unreadable, MlagenError."""
        key = (target, repr(args), repr(sorted(kwargs.items())))
        if shared and key in self._made:
            return self._made[key]
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        self._calls.append(node)
        given = torch.fx.map_arg((args, kwargs), lambda each: each.meta["val"])
        try:
            with self.mode:
                node.meta["val"] = target(*given[0], **given[1])
        except MlagenError:
            raise
        except Exception as error:  # whatever torch raises where a value does not suit it
            raise Unreadable(f"{node.name}: {target}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
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
    """Sort a graph that was changed, take away what is unused now, and check it.

    With the last result of a call that writes to its arguments goes the call, and with that the memory that it was given.
    """
    stable_topological_sort(graph)
    left = set(unused)
    left.update(list(_released(left)))
    for node in reversed(list(graph.nodes)):
        if node not in left or node.users:
            continue
        if is_call(node, operator.getitem) and functional_call(node.args[0]) is not None:
            left.update(node.all_input_nodes)
        elif functional_call(node) is not None:
            left.update(each for each in node.all_input_nodes if is_call(each, *EMPTY))
        graph.erase_node(node)
    graph.lint()


def _released(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """The results of known calls that nodes are results of, too, and that are what they were before: these take their places."""
    for node in nodes:
        call = functional_call(node.args[0]) if is_call(node, operator.getitem) else None
        kept = untouched(call) if call is not None else ()
        if call is None or not kept:
            continue
        for number in {call.result(name) for name in kept} - {0, *(call.result(name) for name in call.written if name not in kept)}:
            before = call.before(number)
            for result in call.results(number):
                for user in list(result.users):
                    if is_call(user, aten.copy_.default) and user.args[0] is before and not user.users:
                        user.graph.erase_node(user)
                result.replace_all_uses_with(before)
                yield result
