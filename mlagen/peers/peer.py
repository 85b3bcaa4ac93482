"""A peer: another way to get a layer's prologue done, which mlagen is measured beside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlagen.spec import PrologueSpec
from mlagen.target import Target
from mlagen.timing.candidate import Candidate
from mlagen.timing.workload import Workload


def other_cache(spec: PrologueSpec, target: Target) -> str:
    """For a peer that writes rows [L+R] to slots that follow one another, and has no other cache."""
    if spec.kv_heads > 1:
        return "it has one KV head"
    return "" if spec.kv_layout == "paged" else "its cache is paged"


@dataclass(frozen=True)
class Peer:
    """What a peer is called, what it is, and how to run it.

    `missing` names in one word what it lacks here, and `misfit` says what of a spec it cannot do; "" if nothing.  `candidates`
    gives the ways to run it on a workload that it fits, of which the fastest counts; it may raise whatever an installation that is
    not as it should be makes it raise.  `weight_bytes` is the size of an element of its W_UK, None where it takes the workload's.
    """

    name: str
    description: str
    missing: Callable[[Target], str]
    misfit: Callable[[PrologueSpec, Target], str]
    candidates: Callable[[Workload], Sequence[Candidate]]
    weight_bytes: int | None = None

    def left_out(self, spec: PrologueSpec, target: Target) -> str:
        """Why it is not measured for a spec on a target; "" where it is.  All peers do the whole prologue, in its usual form."""
        if spec.q_results != ("q_out",) or not spec.write_kv:
            return "it makes one q_out and writes the cache"
        return self.missing(target) or self.misfit(spec, target)
