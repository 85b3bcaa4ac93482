"""The absorb alone, by the vendor's library behind torch.bmm: cuBLAS, or hipBLASLt."""

from collections.abc import Callable

import torch

from mlagen.peers.peer import Peer
from mlagen.spec import PrologueSpec
from mlagen.target import Target
from mlagen.timing.candidate import Candidate
from mlagen.timing.check import product
from mlagen.timing.workload import Workload


def needs_absorb(spec: PrologueSpec, target: Target) -> str:
    return "" if spec.absorbs else "there is no absorb"


def absorber(workload: Workload) -> Callable[[int], torch.Tensor]:
    """ql_nope [T,H,L] of a layer: q_nope as it came where it is absorbed already, else a bmm's into memory of its own."""
    if not workload.spec.absorbs:
        return lambda layer: workload.q_nope
    q_nope, out = workload.q_nope.transpose(0, 1), workload.empty(workload.spec.lora_rank, workload.q.dtype)
    by_head = out.transpose(0, 1)

    def absorb(layer: int) -> torch.Tensor:
        torch.bmm(q_nope, workload.w_uk[layer], out=by_head)
        return out

    return absorb


BMM = Peer(
    "bmm",
    "the absorb alone, by torch.bmm: less than the prologue",
    missing=lambda target: "",
    misfit=needs_absorb,
    candidates=lambda workload: [Candidate("bmm", absorber(workload), product)],
)
