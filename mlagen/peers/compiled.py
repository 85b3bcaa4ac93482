"""torch.compile: of the separate operators as a whole, and of what follows a bmm."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from mlagen.peers.operators import absorb, rest_of, storage
from mlagen.peers.peer import Peer, other_cache
from mlagen.peers.product import absorber, needs_absorb
from mlagen.target import Target
from mlagen.timing.candidate import Candidate
from mlagen.timing.check import rounded
from mlagen.timing.workload import Workload


def _missing(target: Target) -> str:
    return "" if importlib.util.find_spec("triton") else "triton"


def _compile(function: Callable[..., torch.Tensor]) -> Any:
    """`function`, compiled for its shapes alone and in one piece; one that torch gives up on fails instead of running eagerly."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def _whole(workload: Workload) -> list[Candidate]:
    rest, q_nope = rest_of(workload), workload.q_nope
    caches = [storage(cache) for cache in workload.caches]
    if workload.spec.absorbs:
        compiled = _compile(lambda w_uk, cache: rest(absorb(q_nope, w_uk), cache))
        return [Candidate("compile", lambda layer: compiled(workload.w_uk[layer], caches[layer]), rounded)]
    compiled = _compile(lambda cache: rest(q_nope, cache))
    return [Candidate("compile", lambda layer: compiled(caches[layer]), rounded)]


def _after_bmm(workload: Workload) -> list[Candidate]:
    latent, rest = absorber(workload), _compile(rest_of(workload))
    caches = [storage(cache) for cache in workload.caches]
    return [Candidate("bmm+compile", lambda layer: rest(latent(layer), caches[layer]), rounded)]


COMPILE = Peer("compile", "torch.compile of the same operators", missing=_missing, misfit=other_cache, candidates=_whole)

BMM_COMPILE = Peer(
    "bmm+compile",
    "torch.bmm, then torch.compile of the rest",
    missing=_missing,
    misfit=lambda spec, target: needs_absorb(spec, target) or other_cache(spec, target),
    candidates=_after_bmm,
)
