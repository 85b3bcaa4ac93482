"""Tensors between guard bytes: whatever a kernel writes outside its outputs shows."""

from collections.abc import Sequence

import torch

GUARD = 0xA5
"""The byte that fills everything around and between the elements of a guarded tensor."""

MARGIN_BYTES = 4096


class Guarded:
    """A strided tensor inside a larger buffer of GUARD bytes; `strides` are in elements, the last one 1."""

    def __init__(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        size = dtype.itemsize
        extent = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True)) if all(shape) else 0
        self._bytes = torch.full((2 * MARGIN_BYTES + extent * size,), GUARD, dtype=torch.uint8, device=device)
        self._geometry = (tuple(shape), tuple(strides), MARGIN_BYTES // size)
        self.tensor = self._view(self._bytes, dtype)
        self._before = self._bytes.clone()

    def _view(self, buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        shape, strides, offset = self._geometry
        return buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype).as_strided(shape, strides, offset)

    def stray_bytes(self, written: torch.Tensor) -> int:
        """How many bytes changed outside the elements where `written` [shape] is True."""
        allowed = torch.zeros_like(self._bytes)
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[self.tensor.dtype.itemsize]
        self._view(allowed, integer)[written.to(allowed.device)] = -1 if integer is not torch.uint8 else 255
        return int(((self._bytes != self._before) & (allowed == 0)).sum())
