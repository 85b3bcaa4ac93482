"""AITER's HIP kernel: a bmm, then fused_qk_rope_concat_and_cache_mla."""

import importlib
import importlib.util

import torch

from mlagen.peers.peer import Peer, other_cache
from mlagen.peers.product import absorber
from mlagen.spec import PrologueSpec
from mlagen.target import Target
from mlagen.timing.candidate import Candidate
from mlagen.timing.check import rounded
from mlagen.timing.workload import Workload

OPERATOR = "fused_qk_rope_concat_and_cache_mla"


def missing_operator(target: Target, module: str, operator: str) -> str:
    """Why AITER's `operator` cannot run here.  It is known by its operators: PyPI has another package of the name aiter."""
    if target.platform != "amd":
        return "AMD-only"
    found = importlib.util.find_spec("aiter")
    if found is None or found.origin is None:  # a folder of that name, such as one that holds a checkout, is no package
        return "uninstalled"
    try:
        root = importlib.import_module("aiter")
        if not hasattr(root, "__path__") or importlib.util.find_spec("aiter.ops") is None:
            return "unrelated"
        return "" if hasattr(importlib.import_module(module), operator) else "outdated"
    except ModuleNotFoundError as error:
        return "outdated" if (error.name or "").startswith("aiter.") else "broken"
    except Exception:  # an installation can be broken in any way
        return "broken"


def _missing(target: Target) -> str:
    return missing_operator(target, "aiter", OPERATOR)


def _misfit(spec: PrologueSpec, target: Target) -> str:
    if spec.rope_style == "none":
        return "it always rotates"
    if spec.q_dtype == "fp8" and spec.kv_dtype != "fp8":
        return "an fp8 query needs an fp8 cache"
    return other_cache(spec, target)


def _candidates(workload: Workload) -> list[Candidate]:
    fused, spec = getattr(importlib.import_module("aiter"), OPERATOR), workload.spec
    latent = absorber(workload)
    q_out = workload.empty(spec.entry_dim, workload.q_dtype)
    caches = [cache[:, None] for cache in workload.caches]  # blocks of one slot, for which it has its fastest kernel
    cos, sin = (half.contiguous() for half in workload.cos_sin_cache.chunk(2, -1))

    def launch(layer: int) -> torch.Tensor:
        fused(
            latent(layer), workload.q_pe, workload.kv_c, workload.k_pe, caches[layer], q_out, workload.slot_mapping,
            workload.k_scale, workload.q_scale, workload.positions, cos, sin, spec.rope_style == "neox", spec.nope_first,
        )  # fmt: skip
        return q_out

    return [Candidate("bmm+aiter", launch, rounded)]


BMM_AITER = Peer(
    "bmm+aiter",
    "torch.bmm, then AITER's HIP kernel fused_qk_rope_concat_and_cache_mla",
    missing=_missing,
    misfit=_misfit,
    candidates=_candidates,
)
