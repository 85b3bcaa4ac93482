"""Elements followed back through views, against what torch moves where."""

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from mlagen.fx.index import Index, Unreadable, divide, reshaped
from mlagen.fx.reader import Reader

SIZES = {"t": 5, "h": 3, "j": 8}


def evaluate(index, values):
    return index.const + sum(coefficient * values[name] for name, coefficient in index.terms)


def test_a_quotient_of_what_fits():
    assert divide(Index(29, (("h", 48), ("j", 2))), 24, SIZES) == (Index(1, (("h", 2),)), Index(5, (("j", 2),)))
    with pytest.raises(Unreadable, match="rows of 24"):
        divide(Index(35, (("h", 48), ("j", 2))), 24, SIZES)  # 11 + 2 * 7 is beyond 24


@given(st.integers(1, 64), st.integers(0, 200), st.integers(1, 70), st.integers(1, 70))
def test_quotients_are_right_or_refused(stride, const, first, second):
    index = Index(const, (("h", first), ("j", second)))
    try:
        quotient, rest = divide(index, stride, SIZES)
    except Unreadable:
        rest = const % stride + sum(n * c for n, c in ((2, first), (7, second)) if c % stride)
        assert rest >= stride, "it would have been a sum"
        return
    for h in range(3):
        for j in range(8):
            values = {"h": h, "j": j}
            assert divmod(evaluate(index, values), stride) == (evaluate(quotient, values), evaluate(rest, values))


MOVES = {
    "view": lambda x: x.reshape(5, 6, 4),
    "flatten": lambda x: x.flatten(1),
    "permute": lambda x: x.permute(*range(1, x.dim()), 0),
    "transpose": lambda x: x.transpose(0, -1),
    "unsqueeze": lambda x: x.unsqueeze(-2),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "slice": lambda x: x[..., 1:],
    "step": lambda x: x[..., ::2],
    "select": lambda x: x.unsqueeze(0)[0],
    "cat": lambda x: torch.cat((x + 1000, x, x - 1000), -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "split": lambda x: torch.split(x, [1, x.shape[-1] - 1], -1)[1] if x.shape[-1] > 1 else x,
    "chunk": lambda x: x.chunk(2, -1)[0],
    "unbind": lambda x: torch.stack(x.unbind(-1), -1),
    "expand": lambda x: x.unsqueeze(0).expand(2, *x.shape)[1],
    "scatter": lambda x: torch.slice_scatter(torch.zeros_like(x), x, -1, 0, x.shape[-1]),
    "pairs": lambda x: x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if x.shape[-1] % 2 == 0 else x,
    "clone": lambda x: x.clone(memory_format=torch.contiguous_format),
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(MOVES)), max_size=6), st.data())
def test_an_element_is_where_torch_took_it_from(names, data):
    """Each element of the input is its own number, so that the result says where it came from."""
    x = torch.arange(5 * 3 * 8).reshape(5, 3, 8)

    def move(x):
        for name in names:
            if name != "view" or x.numel() == 120:
                x = MOVES[name](x)
        return x

    expected = move(x)
    graph = make_fx(move, tracing_mode="fake")(x).graph
    (placeholder,) = (node for node in graph.nodes if node.op == "placeholder")
    (output,) = (node for node in graph.nodes if node.op == "output")
    where = tuple(data.draw(st.integers(0, extent - 1)) for extent in expected.shape)
    node, index = Reader({}).source(output.args[0], [Index(each) for each in where])
    if node is placeholder:
        assert x[tuple(each.const for each in index)] == expected[where]
    else:
        assert node.target is not operator.getitem
        assert not names or {"cat", "unbind"} & set(names), node.format_node()


@pytest.mark.parametrize("into", [(5, 3, 2, 4), (5, 24), (15, 8), (5, 3, 1, 8), (1, 5, 3, 8)])
def test_variables_survive_a_view(into):
    index = [Index(0, (("t", 1),)), Index(0, (("h", 1),)), Index(5)]
    found = reshaped(index, (5, 3, 8), into, SIZES)
    x = torch.arange(120).reshape(5, 3, 8)
    for t in range(5):
        for h in range(3):
            place = tuple(evaluate(each, {"t": t, "h": h}) for each in found)
            assert x.reshape(into)[place] == x[t, h, 5]


def test_columns_of_two_tensors_are_refused():
    def join(a, b):
        return torch.cat((a, b), -1)

    graph = make_fx(join, tracing_mode="fake")(torch.zeros(5, 4), torch.zeros(5, 4)).graph
    (node,) = (node for node in graph.nodes if node.op == "call_function")
    with pytest.raises(Unreadable, match="more than one tensor"):
        Reader(SIZES).source(node, [Index(), Index(0, (("j", 1),))])
