"""From elements back to a tensor: a part of a node's value that holds them, as a view that a graph can be given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mlagen.fx.index import Index, Size, same_extent
from mlagen.fx.reader import Place, value_of

aten = torch.ops.aten
Emit = Callable[..., fx.Node]
"""Emit(target, *arguments): a new call in the graph, its value known."""


@dataclass(frozen=True)
class Slab:
    """Where `rows` and columns first .. first + width lie among the dimensions of a node's value.

    axes: for each dimension the number of the row variable that runs over it, "columns", or the place that is selected.
    """

    node: fx.Node
    axes: tuple[int | str | Index, ...]
    rows: int
    first: int
    width: int

    def emit(self, emit: Emit) -> fx.Node:
        """The view [rows..., width]."""
        view, axes = self.node, list(self.axes)
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
    """
    each = [dict(chain) for chain in chains]
    for node, index in reversed(chains[0]):
        if value_of(node).dtype not in dtypes or not all(node in chain for chain in each):
            continue
        found = _axes(node, index, [chain[node] for chain in each], rows, column)
        if found is not None:
            return found
    return None


def _axes(
    node: fx.Node, index: tuple[Index, ...], indices: Sequence[tuple[Index, ...]], rows: Sequence[tuple[Index, Size]],
    column: tuple[Index, int],
) -> Slab | None:  # fmt: skip
    variable, width = column
    first: int | None = None
    axes: list[Any] = []
    for dim, place in enumerate(index):
        extent = value_of(node).shape[dim]
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
