"""torch.compile: a prologue written with ordinary operators, found in the graph and replaced by one kernel.

with mlagen.fx.fused_prologue(mlagen.fx.FusionConfig(enabled=True, max_num_seqs=256)):
    compiled(*inputs)  # the first call, which compiles
"""

from mlagen.fx.config import FusionConfig
from mlagen.fx.fuse import FuseProloguePass
from mlagen.fx.hook import ProloguePasses, explained, fused_prologue, install
from mlagen.fx.lift import LiftQPrepPass
from mlagen.fx.packing import repack

__all__ = [
    "FuseProloguePass",
    "FusionConfig",
    "LiftQPrepPass",
    "ProloguePasses",
    "explained",
    "fused_prologue",
    "install",
    "repack",
]
