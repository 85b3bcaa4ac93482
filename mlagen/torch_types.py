"""Element types as torch names them."""

import torch

from mlagen.dtypes import DType


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch type of an element type."""
    found = getattr(torch, dtype.value.torch)
    assert isinstance(found, torch.dtype)
    return found
