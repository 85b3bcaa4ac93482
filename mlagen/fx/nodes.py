"""Nodes of a graph, and the elements of their values."""

from typing import Any

import torch
from torch import fx

from mlagen.fx.index import Index, Unreadable

Place = tuple["fx.Node", tuple[Index, ...]]
"""An element: a node and the index of the element in its value."""


def value_of(node: fx.Node) -> torch.Tensor:
    """What the compiler knows of a node's value.  Raises Unreadable where that is no tensor."""
    found = node.meta.get("val")
    if not isinstance(found, torch.Tensor):
        raise Unreadable(f"{node.name} has no tensor as its value")
    return found


def is_call(node: object, *targets: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def in_order(graph: fx.Graph) -> list[fx.Node]:
    """The nodes, each after what it is made of: what a pattern matcher put into a graph need not be in its place yet."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        left = [node]
        while left:
            missing = [each for each in left[-1].all_input_nodes if each not in found]
            if missing:
                left += missing
            else:
                found[left.pop()] = None
    return list(found)


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of a call, positional or by name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)
