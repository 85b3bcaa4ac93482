"""FlashInfer: a bmm, then rope_quantize_fp8_append_paged_kv_cache."""

import importlib
import importlib.util

import torch

from mlagen.dtypes import DType
from mlagen.peers.peer import Peer, other_cache
from mlagen.peers.product import absorber
from mlagen.spec import PrologueSpec
from mlagen.target import Target
from mlagen.timing.candidate import Candidate
from mlagen.timing.check import rounded
from mlagen.timing.workload import SCALE, Workload

OPERATOR = "rope_quantize_fp8_append_paged_kv_cache"


def _missing(target: Target) -> str:
    return "" if importlib.util.find_spec("flashinfer") else "uninstalled"


def _misfit(spec: PrologueSpec, target: Target) -> str:
    if (spec.q_dtype, spec.kv_dtype) != ("fp8", "fp8"):
        return "query and cache must be fp8"
    if target.fp8 is not DType.E4M3FN:
        return f"it has no {target.fp8}"
    return "it always rotates" if spec.rope_style == "none" else other_cache(spec, target)


def _candidates(workload: Workload) -> list[Candidate]:
    append = getattr(importlib.import_module("flashinfer.rope"), OPERATOR)
    spec, tokens, device = workload.spec, workload.tokens, workload.q.device
    nope, pe = spec.nope_columns, spec.rope_columns
    latent = absorber(workload)
    q_out = workload.empty(spec.entry_dim, workload.q_dtype)
    # Pages of one slot, and requests of one token: then a token's page is its slot.
    caches = [(cache[:, None, nope], cache[:, None, pe]) for cache in workload.caches]
    slots, positions = workload.slot_mapping.int(), workload.positions.int()
    requests = torch.arange(tokens + 1, dtype=torch.int32, device=device)
    first_in_page = torch.zeros(tokens, dtype=torch.int32, device=device)
    table = workload.cos_sin_cache.float()

    def launch(layer: int) -> torch.Tensor:
        append(
            workload.q_pe, workload.k_pe, latent(layer), workload.kv_c, None, table, positions, caches[layer],
            slots, requests, requests[:-1], first_in_page, is_neox=spec.rope_style == "neox", quantize_dtype=workload.q_dtype,
            quant_scale_q=1 / SCALE, quant_scale_kv=1 / SCALE, page_size=1,
            q_rope_out=q_out[..., pe], q_nope_out=q_out[..., nope],
        )  # fmt: skip
        return q_out

    return [Candidate("bmm+flashinfer", launch, rounded)]


BMM_FLASHINFER = Peer(
    "bmm+flashinfer",
    "torch.bmm, then FlashInfer's rope_quantize_fp8_append_paged_kv_cache",
    missing=_missing,
    misfit=_misfit,
    candidates=_candidates,
)
