"""Views of a base, as functional calls have them: which element shows which."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlagen.fx.index import Index, Unreadable
from mlagen.fx.mutation import View


def node_of(value):
    node = torch.fx.Graph().placeholder("base")
    node.meta["val"] = value
    return node


def constants(place):
    return tuple(Index(each) for each in place)


@given(
    rows=st.integers(1, 4), heads=st.integers(1, 3), width=st.integers(2, 5), before=st.integers(0, 3), after=st.integers(0, 3),
    flat=st.booleans(),
)  # fmt: skip
def test_each_element_is_where_torch_has_it(rows, heads, width, before, after, flat):
    whole = before + width + after
    base = torch.arange(rows * heads * whole).view((rows, heads * whole) if flat else (rows, heads, whole))
    shown = base.view(rows, heads, whole)[..., before : before + width]
    view = View(node_of(base), tuple(shown.shape), shown.stride(), shown.storage_offset())
    for place in itertools.product(*map(range, shown.shape)):
        index = view.in_base(constants(place), {})
        assert base[tuple(each.const for each in index)] == shown[place]
        assert view.shows(index, {}) == constants(place)
    for place in itertools.product(*map(range, base.shape)):
        if base[place] not in shown:
            assert view.shows(constants(place), {}) is None


def test_a_variable_that_is_partly_shown_is_refused():
    base = torch.zeros(4, 8)
    view = View(node_of(base), (4, 3), (8, 1), 2)
    t, j = Index(0, (("t", 1),)), Index(0, (("j", 1),))
    sizes = {"t": 4, "j": 3}
    assert view.shows((t, j + 2), sizes) == (t, j)
    assert view.shows((t, j + 5), sizes) is None
    with pytest.raises(Unreadable, match="more than one tensor"):
        view.shows((t, j + 1), sizes)


def test_a_view_that_starts_at_a_symbol_is_refused():
    view = View(node_of(torch.zeros(4, 8)), (4, 3), (8, 1), object())
    with pytest.raises(Unreadable, match="starts at a symbol"):
        view.shows((Index(), Index()), {})
