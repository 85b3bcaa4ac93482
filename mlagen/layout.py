"""Layout: what of a schedule is chosen freely; the rest follows from the shape and the target."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """`waves_per_workgroup` waves share a workgroup.  `block` tokens are multiplied at once from shared memory.

    Without `block` each wave loads its own query.  A `dependent` kernel may be started before the one before it has ended (NVIDIA's
    programmatic dependent launch).
    """

    waves_per_workgroup: int = 1
    block: int | None = None
    dependent: bool = False

    @property
    def suffix(self) -> str:
        """What the names of kernels of this layout end with; nothing for the default."""
        parts = [f"_w{self.waves_per_workgroup}"] if self.waves_per_workgroup != 1 else []
        parts += [f"_b{self.block}"] if self.block is not None else []
        return "".join([*parts, "_pdl" if self.dependent else ""])
