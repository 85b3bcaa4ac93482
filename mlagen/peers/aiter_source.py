"""AITER's Triton operators from a source checkout, without the rest of AITER, whose packages load operators compiled for AMD."""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

# Packages whose own __init__ loads AITER's compiled operators.
_PACKAGES = ("aiter", "aiter.jit", "aiter.ops", "aiter.ops.triton")

# Compile options that only Triton's AMD back end knows.
_AMD_OPTIONS = ("waves_per_eu", "matrix_instr_nonkdim", "kpack")


def import_from(root: str, module: str, arch: str = "gfx942") -> Any:
    """`module` of the AITER checkout at `root`, in packages that stand in for AITER's own as long as this process lives.

    AITER asks what `arch` has, and knows AMD's only: gfx942's fp8 is e4m3fnuz, gfx950's e4m3fn.
    """
    for name in _PACKAGES:
        package = types.ModuleType(name)
        package.__path__ = [str(Path(root, *name.split(".")))]
        sys.modules[name] = package
    info: Any = importlib.import_module("aiter.ops.triton.utils._triton.arch_info")
    info._CACHED_ARCH = arch
    return importlib.import_module(module)


class WithoutOptions:
    """A Triton kernel that is not told AMD's options."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        launch = self._kernel[grid]

        def call(*arguments: Any, **options: Any) -> Any:
            return launch(*arguments, **{name: value for name, value in options.items() if name not in _AMD_OPTIONS})

        return call
