"""Whether the tensors of a call look like those of an earlier one, as far as the checks of arguments look at them.

Looking is most of what a launch costs in Python: a shape and its strides are two tuples of integers, made anew for each tensor.
torch's compiler has the same question in front of every compiled function, and answers it in C++.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

Matcher = Callable[..., bool]


def matcher(tensors: Sequence[torch.Tensor]) -> Matcher:
    """A function of as many arguments: whether each is a tensor of the shape, strides, dtype and device of the one here.

    It asks the arguments themselves, every time, and keeps none of them: a tensor that was changed in place, or that lies where a
    dead one lay, is seen as it is now.  It may say no to a tensor that looks the same, never yes to one that does not.
    """
    guards = _guards()
    if guards is not None:
        check: Matcher = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        if check(*tensors):  # it never accepts one object as two arguments
            return check
    return _python_matcher(tensors)


def _python_matcher(tensors: Sequence[torch.Tensor]) -> Matcher:
    """The same in Python."""
    expected = [_look(each) for each in tensors]

    def check(*given: Any) -> bool:
        return all(isinstance(each, torch.Tensor) and _look(each) == look for each, look in zip(given, expected, strict=True))

    return check


def _look(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@functools.cache
def _guards() -> Any:
    """torch's class of such checks; None where this torch has none that does what is expected of it: it is internal to torch."""
    try:
        from torch._C._dynamo import guards

        found: Any = guards.TensorGuards  # which its stub describes wrongly
        one, other = _empty(), _empty(())
        check = found(one, other, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        accepts = check(one, other) and check(_empty(), _empty(()))
        wrong = [_empty(shape) for shape in ((2, 4), (3, 3), (2,), ())]
        wrong += [_empty(columns=2), _empty(dtype=torch.int32), _empty(device="meta")]
        refuses = not any(check(each, other) for each in (*wrong, None))
        one.resize_(2, 4)
        return found if accepts and refuses and not check(one, other) else None
    except (ImportError, AttributeError, TypeError, RuntimeError):
        return None


def _empty(
    shape: tuple[int, ...] = (2, 3), *, columns: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> torch.Tensor:
    """A small tensor of up to two dimensions, its columns so far apart."""
    return torch.empty_strided(shape, (8, columns)[: len(shape)], dtype=dtype, device=device)
