"""What AITER's operators take beside what a kernel takes, as a kernel takes it."""

from collections.abc import Mapping

import torch

from mlagen.errors import ArgumentError

MODEL_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def rows(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """The first rows of a tensor that has more."""
    return tensor[:tokens] if tensor.dim() and tensor.shape[0] > tokens else tensor


def table(tensor: torch.Tensor) -> torch.Tensor:
    """cos or sin without the dimensions of one element that AITER's other operators have there."""
    while tensor.dim() > 2 and tensor.shape[1] == 1:
        tensor = tensor.select(1, 0)
    return tensor


def one_element(tensor: torch.Tensor) -> torch.Tensor:
    """A scale of any shape with one element."""
    return tensor.reshape(1) if tensor.ndim > 1 and tensor.numel() == 1 else tensor


def by_name(error: ArgumentError, names: Mapping[str, str]) -> ArgumentError:
    """The error of a kernel, with AITER's name of the argument that it blames."""
    name, _, rest = str(error).partition(":")
    return ArgumentError(f"{names.get(name, name)}:{rest}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
