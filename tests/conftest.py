"""What every test shares: skipping by need, and hypothesis's profiles.

A test says with a marker what it needs (`@pytest.mark.host`, ...); where that is missing the test is skipped, and one word says
what it lacks.  The markers are described in pyproject.toml.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core already; read when torch is first imported

# The tests' own cache of compiled kernels, not the user's; it outlives a run, because entries are found by their content.
os.environ["MLAGEN_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "mlagen")

# The tests know the tables that are shipped, and those that they write.
os.environ.pop("MLAGEN_TABLES", None)

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, print_blob=True)
settings.register_profile("dev", deadline=None, max_examples=40, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _missing_compiler() -> str:
    return "" if _installed("ziglang") else "ziglang"


def _missing_cuda() -> str:
    from mlagen import cuda_toolchain
    from mlagen.errors import ToolchainError

    try:
        cuda_toolchain.fingerprint()
    except ToolchainError:
        return "nvrtc"
    return ""


def _missing_host() -> str:
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return "" if any(c and shutil.which(c) for c in compilers) or _installed("ziglang") else "compiler"


def _missing_isa() -> str:
    root = os.environ.get("TINYGRAD_ROOT")
    if not root or not (Path(root) / "test/mockgpu/amd/emu.py").is_file():
        return "TINYGRAD_ROOT"
    return "" if shutil.which(os.environ.get("CC", "clang")) else "clang"  # the emulator compiles each instruction with CC


def _missing_gpu() -> str:
    if not _installed("torch"):
        return "gpu"
    import torch

    return "" if torch.cuda.is_available() else "gpu"  # ROCm's torch answers here too


def _missing_vllm() -> str:
    found = importlib.util.find_spec("vllm")
    return "" if found and found.origin else "vllm"  # tests/vllm is a folder of that name, and no package


def _missing_aiter() -> str:
    if word := _missing_gpu():
        return word
    from mlagen.peers.aiter_hip import OPERATOR, missing_operator
    from mlagen.runtime import device_arch
    from mlagen.target import find_target

    return missing_operator(find_target(device_arch(0)), "aiter", OPERATOR)


def _missing_aiter_root() -> str:
    root = os.environ.get("AITER_ROOT")
    return "" if root and Path(root, "aiter").is_dir() else "AITER_ROOT"


def _missing_triton() -> str:
    return "" if _installed("triton") else "triton"


def _missing_interpreter() -> str:
    import numpy as np

    # Triton 3.6's interpreter takes an array of one element for an integer, which NumPy 2.4 refuses.
    return _missing_triton() or ("numpy" if np.lib.NumpyVersion(np.__version__) >= "2.4.0" else "")


_MISSING: dict[str, Callable[[], str]] = {
    "compiler": _missing_compiler,
    "cuda": _missing_cuda,
    "host": _missing_host,
    "isa": _missing_isa,
    "gpu": _missing_gpu,
    "vllm": _missing_vllm,
    "aiter": _missing_aiter,
    "aiter_root": _missing_aiter_root,
    "triton": _missing_triton,
    "interpreter": _missing_interpreter,
}


@functools.cache
def _missing(need: str) -> str:
    """The word for what `need` lacks here, or nothing; asked once a process, and only if a test needs it."""
    return _MISSING[need]()


@pytest.hookimpl(tryfirst=True)  # before the test's fixtures are set up
def pytest_runtest_setup(item: pytest.Item) -> None:
    for need in _MISSING:
        if item.get_closest_marker(need) and (word := _missing(need)):
            pytest.skip(word)
