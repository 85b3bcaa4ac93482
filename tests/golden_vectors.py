"""The vectors under tests/golden: what AITER's own kernels were given, and what they gave."""

from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
HIP = sorted((GOLDEN / "aiter_hip").glob("*.npz"))
FP8_BMM = sorted(GOLDEN.glob("aiter_triton_fp8bmm_*.npz"))
NO_ABSORB = sorted(GOLDEN.glob("aiter_triton_noabsorb_*.npz"))
FP8_BMM = sorted(GOLDEN.glob("aiter_triton_fp8bmm_*.npz"))

Vectors = dict[str, torch.Tensor]


def read(path: Path) -> Vectors:
    """The file's arrays, bit patterns as the types that they are."""
    types = {np.dtype("uint16"): torch.bfloat16, np.dtype("uint8"): torch.float8_e4m3fn}
    with np.load(path) as arrays:
        return {
            name: torch.from_numpy(array).view(types[array.dtype]) if array.dtype in types else torch.from_numpy(array)
            for name, array in arrays.items()
        }


def same_bits(ours: torch.Tensor, golden: torch.Tensor) -> torch.Tensor:
    integer = {1: torch.uint8, 2: torch.int16}[ours.dtype.itemsize]
    return ours.view(integer) == golden.view(integer)


def saturated(ours: torch.Tensor, golden: torch.Tensor) -> torch.Tensor:
    """Where AITER overflows to NaN and we end at the format's limit."""
    return golden.float().isnan() & (ours.float().abs() == 448)
