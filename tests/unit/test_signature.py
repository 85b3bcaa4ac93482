"""Recognising tensors: by what they are when asked, never by which object they are; in C++ where torch can, else in Python."""

import gc
import weakref

import pytest
import torch

from mlagen import signature
from mlagen.signature import matcher


@pytest.fixture(params=["torch's", "in Python"], autouse=True)
def _way(request, monkeypatch):
    if request.param == "in Python":
        monkeypatch.setattr(signature, "_guards", lambda: None)
    elif signature._guards() is None:
        pytest.skip("guards")


def make(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def test_equal_looks_match():
    matches = matcher([make(4, 6), make()])
    assert matches(make(4, 6), make())
    assert matches(torch.empty(4, 6), torch.empty(()))
    assert matches(make(8, 6)[2:6], make(3)[1])  # wherever it lies


@pytest.mark.parametrize(
    "other",
    [
        lambda: make(5, 6),
        lambda: make(4, 7),
        lambda: make(24),
        lambda: make(4, 6, 1),
        lambda: make(6, 4).mT,
        lambda: make(4, 12)[:, ::2],
        lambda: make(4, 12)[:, :6],
        lambda: make(1, 6).expand(4, 6),
        lambda: make(4, 6, dtype=torch.int32),
        lambda: make(4, 6, dtype=torch.bfloat16),
        lambda: make(4, 6, device="meta"),
        lambda: None,
        lambda: [[0.0] * 6] * 4,
        lambda: make(4, 6).numpy(),
    ],
    ids=[
        *("rows", "columns", "flat", "rank", "transposed", "every second", "longer rows", "expanded"),
        *("int32", "bf16", "meta", "none", "list", "array"),
    ],
)
def test_other_looks_do_not(other):
    matches = matcher([make(4, 6), make()])
    assert not matches(other(), make())
    assert not matcher([make(), make(4, 6)])(make(), other())


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.resize_(2, 6),
        lambda tensor: tensor.set_(make(6, 4)),
        lambda tensor: tensor.t_(),
        lambda tensor: tensor.unsqueeze_(0),
        lambda tensor: tensor.as_strided_((4, 3), (6, 2)),
        lambda tensor: setattr(tensor, "data", make(4, 6, dtype=torch.bfloat16)),
        lambda tensor: setattr(tensor, "data", make(2, 6)),
    ],
    ids=["resize_", "set_", "t_", "unsqueeze_", "as_strided_", "data of another type", "data of another shape"],
)
def test_a_change_in_place_is_seen(change):
    tensor = make(4, 6)
    matches = matcher([tensor])
    assert matches(tensor)
    change(tensor)
    assert not matches(tensor)


def test_nothing_is_kept_alive_and_an_address_used_again_is_no_proof():
    tensor = make(4, 6)
    matches, dead, identity = matcher([tensor]), weakref.ref(tensor), id(tensor)
    del tensor
    gc.collect()
    assert dead() is None
    for _ in range(1000):  # the next object of the same size is likely to lie there
        other = make(4, 5)
        if id(other) == identity:
            break
    assert not matches(other)


def test_one_object_in_two_places():
    one = make(4, 6)
    matches = matcher([one, one])
    assert matches(one, one)
    assert matches(one, make(4, 6))
    assert not matches(one, make(4, 5))


def test_a_subclass_is_recognised():
    matches = matcher([torch.nn.Parameter(make(4, 6), requires_grad=False)])
    assert matches(torch.nn.Parameter(make(4, 6), requires_grad=False))
    assert not matches(torch.nn.Parameter(make(4, 5), requires_grad=False))
