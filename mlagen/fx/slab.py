"""From elements back to a tensor: a part of a node's value that holds them, as a view that a graph can be given."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mlagen.fx.index import Index, Size, same_extent
from mlagen.fx.mutation import functional_call
from mlagen.fx.nodes import Place, is_call, value_of

aten = torch.ops.aten
Emit = Callable[..., fx.Node]
"""Emit(target, *arguments): a new call in the graph, its value known."""


@dataclass(frozen=True)
class Slab:
    """Where `rows` and columns first .. first + width lie among the dimensions of a node's value.

    axes: for each dimension the number of the row variable that runs over it, "columns", or the place that is selected.
    shape: what the node is seen as before, -1 for a symbol's extent; None as it is.
    """

    node: fx.Node
    axes: tuple[int | str | Index, ...]
    rows: int
    first: int
    width: int
    shape: tuple[int, ...] | None = None

    def emit(self, emit: Emit) -> fx.Node:
        """The view [rows..., width]."""
        view, axes = self.node, list(self.axes)
        if self.shape is not None:
            view = emit(aten.view.default, view, list(self.shape))
        for dim in reversed(range(len(axes))):
            axis = axes[dim]
            if isinstance(axis, Index):
                view = emit(aten.select.int, view, dim, axis.const)
                del axes[dim]
            elif axis == "columns" and value_of(view).shape[dim] != self.width:
                view = emit(aten.slice.Tensor, view, dim, self.first, self.first + self.width)
        order = sorted(range(len(axes)), key=lambda dim: self.rows if axes[dim] == "columns" else axes[dim])  # type: ignore[arg-type,return-value]
        if order != list(range(len(axes))):
            view = emit(aten.permute.default, view, order)
        for row in range(self.rows):
            if row not in axes:
                view = emit(aten.unsqueeze.default, view, row)
        return view


def find_slab(
    chains: Sequence[Sequence[Place]], rows: Sequence[tuple[Index, Size]], dtypes: Sequence[torch.dtype], column: tuple[Index, int]
) -> Slab | None:
    """The tensor deepest in the graph that holds all columns next to each other, of one of these types.

    chains: for each column the way to its element; or one for all of them, where `column` is their variable and number.
    rows: the variables of the other dimensions and their extents.  None where no tensor on the way is such a one.
    What was there before a call wrote to another part of it comes first: it needs no call.
    """
    each = [dict(chain) for chain in chains]
    nodes = [node for node, _ in chains[0]]
    calls = [place for place, node in enumerate(nodes) if is_call(node, operator.getitem) and functional_call(node.args[0])]
    if calls and calls[-1] + 1 < len(nodes):
        earlier = find_slab([_until(chain, nodes[calls[-1] + 1]) for chain in chains], rows, dtypes, column)
        if earlier is not None:
            return earlier
    for node in reversed(nodes):
        if value_of(node).dtype not in dtypes or not all(node in chain for chain in each):
            continue
        found = _axes(node, value_of(node).shape, [chain[node] for chain in each], rows, column)
        if found is not None:
            return found
    return _split(each, chains[0], rows, dtypes, column)


def _until(chain: Sequence[Place], node: fx.Node) -> Sequence[Place]:
    """The way from a node on."""
    return next((chain[place:] for place, (other, _) in enumerate(chain) if other is node), ())


def _split(
    each: Sequence[Mapping[fx.Node, tuple[Index, ...]]], chain: Sequence[Place], rows: Sequence[tuple[Index, Size]],
    dtypes: Sequence[torch.dtype], column: tuple[Index, int],
) -> Slab | None:  # fmt: skip
    """The same where rows and columns share the last dimension of a tensor, which a view takes apart."""
    for node, index in reversed(chain):
        value = value_of(node)
        strides = {coefficient for _, coefficient in index[-1].terms if coefficient > 1} if index else set()
        extent = value.shape[-1] if index else None
        if value.dtype not in dtypes or not all(node in other for other in each) or len(strides) != 1:
            continue
        (stride,) = strides
        symbols = sum(not isinstance(size, int) for size in value.shape)
        if not isinstance(extent, int) or extent % stride or symbols > 1:
            continue
        shape = (*value.shape[:-1], extent // stride, stride)
        indices = [_taken_apart(other[node], stride) for other in each]
        found = _axes(node, shape, indices, rows, column)
        if found is not None and found.axes[-1] == "columns" and found.first + found.width <= stride:
            return dataclasses.replace(found, shape=tuple(size if isinstance(size, int) else -1 for size in shape))
    return None


def _taken_apart(index: tuple[Index, ...], stride: int) -> tuple[Index, ...]:
    """The index where the last dimension is rows of `stride`."""
    last = index[-1]
    outer = tuple((name, coefficient // stride) for name, coefficient in last.terms if coefficient % stride == 0)
    inner = tuple(term for term in last.terms if term[1] % stride)
    return *index[:-1], Index(last.const // stride, outer), Index(last.const % stride, inner)


def _axes(
    node: fx.Node, shape: Sequence[Size], indices: Sequence[tuple[Index, ...]], rows: Sequence[tuple[Index, Size]],
    column: tuple[Index, int],
) -> Slab | None:  # fmt: skip
    index = indices[0]
    variable, width = column
    first: int | None = None
    axes: list[Any] = []
    for dim, place in enumerate(index):
        extent = shape[dim]
        among = [row for row, (index_of, _) in enumerate(rows) if index_of == place and index_of.terms]
        steps = [other[dim] == place + j for j, other in enumerate(indices)]
        if among and all(other[dim] == place for other in indices):
            if among[0] in axes or not same_extent(extent, rows[among[0]][1]):
                return None
            axes.append(among[0])
        elif (len(indices) > 1 and all(steps)) or (len(indices) == 1 and place.terms == variable.terms and place.terms):
            if first is not None or (len(indices) > 1 and place.terms):
                return None
            first = place.const
            axes.append("columns")
        elif not place.terms and all(other[dim] == place for other in indices):
            axes.append(place)
        else:
            return None
    absent = [row for row, (index_of, _) in enumerate(rows) if row not in axes and index_of.terms]
    return None if first is None or absent else Slab(node, tuple(axes), len(rows), first, width)
