"""The dtypes by AITER's names, and what its command lines read them with."""

import argparse
import os

import torch

from mlagen.target import TARGETS
from mlagen.torch_types import torch_dtype

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

# AITER asks the GPU, or this variable of its own.
fp8 = torch_dtype(TARGETS[os.environ["GPU_ARCHS"]].fp8)

d_dtypes = {"bf16": bf16, "fp16": fp16, "fp32": fp32, "fp8": fp8}


def str2Dtype(text: str) -> torch.dtype:
    """A dtype of d_dtypes."""
    return d_dtypes[text]


def str2bool(text: str) -> bool:
    """True or false, as a word."""
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected true or false") from None
