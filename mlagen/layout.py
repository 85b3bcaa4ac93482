"""Layout: what of a schedule is chosen freely; the rest follows from the shape and the target."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """`waves_per_workgroup` waves share a workgroup.  `block` tokens are multiplied at once from shared memory.

    Without `block` each wave loads its own query.  A `dependent` kernel may be started before the one before it has ended (NVIDIA's
    programmatic dependent launch).  `m_tiles` matrix instructions side by side make a wave's latent columns; None leaves their
    number to the schedule's rule.  Packed weights lie in the order that it makes, so all kernels of a spec have the same.
    """

    waves_per_workgroup: int = 1
    block: int | None = None
    dependent: bool = False
    m_tiles: int | None = None

    @property
    def suffix(self) -> str:
        """What the names of kernels of this layout end with; nothing for the default."""
        parts = [f"_w{self.waves_per_workgroup}"] if self.waves_per_workgroup != 1 else []
        parts += [f"_b{self.block}"] if self.block is not None else []
        parts += [f"_m{self.m_tiles}"] if self.m_tiles is not None else []
        return "".join([*parts, "_pdl" if self.dependent else ""])
