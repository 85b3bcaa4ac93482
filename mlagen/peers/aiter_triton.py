"""AITER's Triton kernel fused_fp8_bmm_rope_cat_and_cache_mla, which absorbs too: W_UK in fp8, and q_nope rounded to fp8 on the way.

It has no scale of the query, whose rows are therefore written in the model's dtype.  On AMD it comes from the installed AITER, with
the tiles that AITER chooses.  On NVIDIA it comes from a source checkout, which the variable AITER_ROOT names, without the rest of
AITER and with the best of some tiles: AITER has none for these GPUs.
"""

import functools
import importlib
import itertools
import os
from pathlib import Path
from typing import Any

import torch

from mlagen.peers.aiter_hip import missing_operator
from mlagen.peers.aiter_source import WithoutOptions, import_from
from mlagen.peers.peer import Peer, other_cache
from mlagen.spec import PrologueSpec
from mlagen.target import Target
from mlagen.timing.candidate import Candidate
from mlagen.timing.check import rounded
from mlagen.timing.workload import Workload
from mlagen.torch_types import torch_dtype

MODULE = "aiter.ops.triton.fusions.fused_bmm_rope_kv_cache"
OPERATOR = "fused_fp8_bmm_rope_cat_and_cache_mla"
KERNEL = "_fused_fp8_bmm_rope_cat_and_cache_mla_kernel"
SOURCE = Path(*MODULE.split(".")).with_suffix(".py")

_TOKENS, _COLUMNS, _WARPS = (16, 32, 64), (32, 64, 128), (4, 8)

_FP8_ROUNDING = 2.0**-4
"""Largest relative error of rounding to three bits behind the leading one."""


def _missing(target: Target) -> str:
    if target.platform == "amd":
        return missing_operator(target, MODULE, OPERATOR)
    root = os.environ.get("AITER_ROOT")
    return "" if root and Path(root, SOURCE).is_file() else "AITER_ROOT"


def _misfit(spec: PrologueSpec, target: Target) -> str:
    if not spec.absorbs:
        return "it always absorbs"
    if spec.rope_style == "none":
        return "it always rotates"
    if any(width & (width - 1) for width in (spec.lora_rank, spec.rope_dim)):
        return "L and R must be powers of two"
    if not spec.nope_first:
        return "its rotary columns are the last"
    return other_cache(spec, target)


@functools.cache
def from_checkout(root: str, arch: str = "gfx942") -> Any:
    """The operator of the AITER checkout at `root`, on whatever GPU Triton compiles for; `arch` is what AITER takes it for."""
    module = import_from(root, MODULE, arch)
    setattr(module, KERNEL, WithoutOptions(getattr(module, KERNEL)))
    return getattr(module, OPERATOR)


_Configurations = dict[str, dict[str, Any] | None]
"""By a name of their own; None is AITER's choice."""


def _tiles(tokens: int) -> _Configurations:
    """Configurations to try where AITER has none, without a tile far larger than the tokens."""
    found: _Configurations = {}
    for rows, columns, warps in itertools.product(_TOKENS, _COLUMNS, _WARPS):
        if rows <= max(_TOKENS[0], tokens):
            tile = {"BLOCK_SIZE_M": rows, "BLOCK_SIZE_N": columns, "GROUP_SIZE_M": 1, "num_warps": warps, "num_stages": 2}
            options = {"waves_per_eu": 1, "matrix_instr_nonkdim": 16, "cache_modifier": ".cg"}
            found[f"{rows} x {columns}, {warps} warps"] = {**tile, **options}
    return found


def _candidates(workload: Workload) -> list[Candidate]:
    spec = workload.spec
    if workload.target.platform == "amd":
        operator = getattr(importlib.import_module(MODULE), OPERATOR)
        configurations: _Configurations = {"aiter-triton": None}
    else:
        operator = from_checkout(os.environ["AITER_ROOT"])
        configurations = _tiles(workload.tokens)
    fp8 = torch_dtype(workload.target.fp8)
    weights = [_quantized(w_uk, fp8) for w_uk in workload.w_uk]
    caches = [cache[:, None] for cache in workload.caches]
    q_nope, kv_c, k_pe = workload.q_nope.transpose(0, 1), workload.kv_c[:, None], workload.k_pe[:, None]
    cos, sin = (half.contiguous() for half in workload.cos_sin_cache.chunk(2, -1))
    k_scale = workload.k_scale if spec.kv_dtype == "fp8" else None

    def candidate(name: str, configuration: dict[str, Any] | None) -> Candidate:
        def launch(layer: int) -> torch.Tensor:
            q_out, *_ = operator(
                q_nope, *weights[layer], workload.q_pe, kv_c, k_pe, caches[layer], workload.slot_mapping, workload.positions,
                cos, sin, config=None if configuration is None else dict(configuration), k_scale=k_scale,
                is_neox=spec.rope_style == "neox", q_out_dtype=workload.q.dtype,
            )  # fmt: skip
            assert isinstance(q_out, torch.Tensor)
            return q_out

        return Candidate(name, launch, functools.partial(rounded, absorb_error=2 * _FP8_ROUNDING))

    return [candidate(name, configuration) for name, configuration in configurations.items()]


def _quantized(w_uk: torch.Tensor, fp8: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """W_UK [H,P,L] as it takes it: codes [H,L,P], and one scale [1] for all."""
    scale = w_uk.abs().max().float() / torch.finfo(fp8).max
    return (w_uk.float() / scale).to(fp8).transpose(1, 2).contiguous(), scale.reshape(1)


AITER_TRITON = Peer(
    "aiter-triton",
    "AITER's Triton kernel fused_fp8_bmm_rope_cat_and_cache_mla: W_UK in fp8, the query in the model's dtype",
    missing=_missing,
    misfit=_misfit,
    candidates=_candidates,
    weight_bytes=1,
)
