"""torch, eagerly: each operator a launch of its own."""

import torch

from mlagen.peers.operators import absorb, rest_of, storage
from mlagen.peers.peer import Peer, other_cache
from mlagen.timing.candidate import Candidate, Launch
from mlagen.timing.check import rounded
from mlagen.timing.workload import Workload


def prologue(workload: Workload) -> Launch:
    """The whole prologue of a layer as separate operators."""
    rest, spec = rest_of(workload), workload.spec
    caches = [storage(cache) for cache in workload.caches]

    def launch(layer: int) -> torch.Tensor:
        latent = absorb(workload.q_nope, workload.w_uk[layer]) if spec.absorbs else workload.q_nope
        return rest(latent, caches[layer])

    return launch


EAGER = Peer(
    "eager",
    "torch's operators, one after the other",
    missing=lambda target: "",
    misfit=other_cache,
    candidates=lambda workload: [Candidate("eager", prologue(workload), rounded)],
)
