"""AITER's helpers for tests: a comparison, here one that fails, and wrappers that time, here only for the sake of their result."""

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch

NEIGHBOURS = 2.0**-3
"""Largest relative distance of neighbouring fp8 values with three bits behind the leading one."""

Function = Callable[..., Any]


def checkAllclose(
    a: torch.Tensor,
    b: torch.Tensor,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    tol_err_ratio: float = 0.05,
    msg: str = "",
) -> float:
    """The share of elements that are not close; AssertionError if it is large, or one of them is more than an fp8 code away.

    AITER only logs a large share.  Neighbouring codes occur because the file rounds rotated values to bf16 before it quantises
    them: a sixteenth of them then lies on a tie, of which half went the other way in fp32.
    """
    far = ~torch.isclose(a, b, rtol=rtol, atol=atol)
    share = int(far.sum()) / far.numel()
    assert share <= tol_err_ratio, f"{msg}: {share:.2%} of {a.numel()} elements are not close"
    step = NEIGHBOURS * torch.minimum(a.abs(), b.abs())
    beyond = far & ~((a - b).abs() <= step)
    assert not beyond.any(), f"{msg}: {int(beyond.sum())} of {a.numel()} elements are no neighbours"
    return share


def run_perftest(function: Function, *arguments: Any, **options: Any) -> tuple[Any, float]:
    """(the second result, microseconds that it took): a first call loads, another one finds what is loaded."""
    function(*arguments, **options)
    start = time.perf_counter()
    result = function(*arguments, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, 1e6 * (time.perf_counter() - start)


def perftest(rounds: int = 1) -> Callable[[Function], Function]:
    """A decorator: the function then returns what run_perftest does."""
    return lambda function: functools.partial(run_perftest, function)


def benchmark() -> Callable[[Function], Function]:
    """A decorator: the function then returns its arguments by name, and its own result's entries."""

    def decorate(function: Function) -> Function:
        def call(*arguments: Any, **options: Any) -> dict[str, Any]:
            return {**inspect.getcallargs(function, *arguments, **options), **function(*arguments, **options)}

        return call

    return decorate
