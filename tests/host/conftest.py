"""Fixtures of the host tier."""

import mmap
import os

import pytest
import torch


@pytest.fixture
def sparse(tmp_path):
    """A function that gives tensors with huge strides: address space, and memory only where it is touched."""
    files = []

    def make(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        elements = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        path = tmp_path / f"sparse{len(files)}"
        with open(path, "wb") as file:
            file.truncate(elements * dtype.itemsize)
        with open(path, "r+b") as file:
            files.append(mmap.mmap(file.fileno(), 0))
        os.unlink(path)
        return torch.frombuffer(files[-1], dtype=dtype).as_strided(shape, strides)

    return make
