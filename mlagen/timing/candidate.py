"""A candidate: one way to do a layer's work, ready to be recorded, checked and timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mlagen.runtime import Kernel
from mlagen.timing.check import Check, explained
from mlagen.timing.workload import Workload

Result = torch.Tensor | tuple[torch.Tensor, ...] | None
"""What will hold the query that a method makes: one tensor, several, or, where it only writes the cache, none."""

Launch = Callable[[int], Result]
"""Enqueues one layer's work on the current stream, without waiting, and returns what will hold its result."""


@dataclass(frozen=True)
class Candidate:
    """`launch` does the work of any of the workload's layers, `check` judges its result; `name` tells apart those of one method."""

    name: str
    launch: Launch
    check: Check


def pack(kernel: Kernel, workload: Workload) -> list[torch.Tensor]:
    """Each layer's weights as the kernel, and every other one of its spec and target, wants them."""
    if workload.codes:
        return [kernel.pack_weights(codes.w_uk, codes.scale) for codes in workload.codes]
    return [kernel.pack_weights(w_uk) for w_uk in workload.w_uk]


def kernel_candidate(kernel: Kernel, workload: Workload, packed: Sequence[torch.Tensor] | None = None) -> Candidate:
    """A kernel of mlagen's; `packed` is what pack() gave, where several kernels share it."""
    packed = pack(kernel, workload) if packed is None else packed
    caches = [workload.paged(layer) for layer in range(workload.layers)]
    out = workload.out()
    q_scale = workload.q_scale if workload.spec.q_scaling == "static" else None

    def launch(layer: int) -> Result:
        kernel(
            workload.q, workload.kv_c, workload.k_pe, packed[layer] if packed else None, caches[layer], workload.slot_mapping,
            workload.positions, workload.cos_sin_cache, q_scale=q_scale, k_scale=workload.k_scale, out=out,
        )  # fmt: skip
        return out

    return Candidate(kernel.generated.name, launch, explained)
