"""What is wanted of the passes, in one object."""

import math
from dataclasses import dataclass

import torch

from mlagen.errors import SpecError, TargetError
from mlagen.runtime import device_arch
from mlagen.spec import ROUNDINGS
from mlagen.target import TARGETS, find_target

BOOLEANS = ("enabled", "fuse", "lift", "assume_padded_slots_skip", "assume_positions_valid", "division_as_product")


@dataclass(frozen=True)
class FusionConfig:
    """Which graphs the passes change, and how.  Nothing is changed where `enabled` is left out.

    max_num_seqs, num_speculative_tokens: a decode step has at most max_num_seqs * (1 + num_speculative_tokens) rows, and only a
    graph whose rows are known to be no more is changed.  max_tokens says this number itself; math.inf takes every graph.
    fuse: make one kernel of the query and the cache update.  lift: replace the preparation of a query that is not fused by
    mlagen::mla_decode_q_prep, for a pass of your own that looks for it.
    arch: the architecture whose program runs on the CPU (the host run); on a GPU it is asked for.
    rounding: as PrologueSpec has it; "stepwise" comes closest to what the graph computed.

    What the graph does not say: in torch's own indexing a negative slot or position counts from the end, and the passes keep that,
    at the cost of an elementwise kernel for each distinct vector.  assume_padded_slots_skip=True says that a negative slot is
    padding and means "do not write", assume_positions_valid=True that no position is negative.
    division_as_product=True lets x / scale be computed as x * (1 / scale), which may round a code differently.

    Raises SpecError, naming the field, what it was and what it may be.
    """

    enabled: bool = False
    max_num_seqs: int = 256
    num_speculative_tokens: int = 0
    max_tokens: float | None = None
    fuse: bool = True
    lift: bool = False
    arch: str | None = None
    rounding: str = "fused"
    assume_padded_slots_skip: bool = False
    assume_positions_valid: bool = False
    division_as_product: bool = False

    def __post_init__(self) -> None:
        for field in BOOLEANS:
            if not isinstance(getattr(self, field), bool):
                raise SpecError(f"{field}={getattr(self, field)!r}: must be True or False")
        for field, least in (("max_num_seqs", 1), ("num_speculative_tokens", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SpecError(f"{field}={value!r}: must be an integer of at least {least}")
        whole = isinstance(self.max_tokens, int) and not isinstance(self.max_tokens, bool) and self.max_tokens > 0
        if self.max_tokens is not None and self.max_tokens != math.inf and not whole:
            raise SpecError(f"max_tokens={self.max_tokens!r}: must be a positive integer, math.inf or None")
        if self.rounding not in ROUNDINGS:
            raise SpecError(f"rounding={self.rounding!r}: must be one of {', '.join(ROUNDINGS)}")
        if self.arch is not None and self.arch not in TARGETS:
            raise SpecError(f"arch={self.arch!r}: must be one of {', '.join(TARGETS)}, or None")

    @property
    def token_limit(self) -> float:
        """The largest number of rows of a graph that is changed."""
        return self.max_num_seqs * (1 + self.num_speculative_tokens) if self.max_tokens is None else self.max_tokens

    def arch_for(self, device: torch.device) -> str:
        """The architecture whose kernels run on `device`.  Raises TargetError where there is none."""
        if device.type == "cpu":
            if self.arch is None:
                raise TargetError(f"arch: the host run needs to know whose program to run: one of {', '.join(TARGETS)}")
            return self.arch
        if device.type != "cuda" or not torch.cuda.is_available():
            raise TargetError(f"device {device}: no kernels for it")
        actual = find_target(device_arch(torch.cuda.current_device() if device.index is None else device.index)).arch
        if self.arch is not None and self.arch != actual:
            raise TargetError(f"arch={self.arch!r}: {device} is a {actual}; leave arch out")
        return actual
