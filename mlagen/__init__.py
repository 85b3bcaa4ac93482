"""mlagen: one fused GPU kernel for the MLA decode prologue.

    spec = mlagen.PrologueSpec.from_model("deepseek-r1", tp=8)
    kernel = mlagen.load(spec, device="cpu", arch="gfx950")

Names are imported when they are first used, so that the compiler works without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlagen.codegen import generate as generate
    from mlagen.runtime import Kernel as Kernel
    from mlagen.runtime import load as load
    from mlagen.spec import PrologueSpec as PrologueSpec
    from mlagen.target import TARGETS as TARGETS

__version__ = "0.1.0"

_HOMES = {
    "PrologueSpec": "mlagen.spec",
    "TARGETS": "mlagen.target",
    "generate": "mlagen.codegen",
    "Kernel": "mlagen.runtime",
    "load": "mlagen.runtime",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mlagen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
