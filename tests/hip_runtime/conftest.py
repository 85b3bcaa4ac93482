"""The stand-in for a machine with AMD GPUs: two HIP runtimes on the disk, code objects, and the host builds that run for them."""

import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


@functools.cache
def _missing() -> str:
    """The word for what is missing here, or nothing."""
    try:
        importlib.metadata.version("hip-python")  # not its module, whose name is this folder's too
    except importlib.metadata.PackageNotFoundError:
        return "hip-python"
    if importlib.util.find_spec("torch") is None:
        return "torch"
    import torch

    # There the stand-in would be the second runtime of the process, or not be found.
    return "cpu-torch" if torch.version.hip or importlib.util.find_spec("rocm_sdk") else ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if word := _missing():
        pytest.skip(word)


@dataclass(frozen=True)
class StandIn:
    """`rocm` is laid out as a ROCm installation, `torch` as PyTorch's wheels, which bring a copy of the runtime."""

    folder: Path

    @property
    def rocm(self) -> Path:
        return self.folder / "rocm"

    @property
    def torch(self) -> Path:
        return self.folder / "torch"

    @property
    def torch_library(self) -> str:
        return str(self.torch / "lib" / "libamdhip64.so")

    def run(self, *command: str, rocm: Path | None = None, devices: str = "gfx942", **variables: str):
        """What a program of programs.py returns.  The loader finds the runtime of `rocm`, the installation if it is None."""
        rocm = rocm or self.rocm
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
            "LD_LIBRARY_PATH": str(rocm / "lib"),
            "ROCM_PATH": str(self.folder / "nothing"),  # hip-python 10 looks there, else in /opt/rocm, before it asks the loader
            "MLAGEN_CACHE_DIR": str(self.folder / "cache"),
            "MLAGEN_STANDIN_KERNELS": str(self.folder / "kernels"),
            "MLAGEN_STANDIN_DEVICES": devices,
            **variables,
        }
        for name in ("MLAGEN_BUNDLE_PATH", "MLAGEN_JIT", "MLAGEN_TOOLCHAIN", "ROCM_HOME"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, str(HERE / "programs.py"), *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    from mlagen import toolchain

    folder = tmp_path_factory.mktemp("standin")
    for name in ("rocm/lib", "torch/lib", "kernels", "nothing"):
        (folder / name).mkdir(parents=True)
    library = folder / "rocm/lib/libamdhip64.so.7"
    library.write_bytes(toolchain.compile_host((HERE / "standin/libamdhip64.cpp").read_text(), name="libamdhip64"))
    (folder / "rocm/lib/libamdhip64.so").symlink_to(library.name)
    shutil.copy(library, folder / "torch/lib/libamdhip64.so")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.setenv("MLAGEN_CACHE_DIR", str(folder / "cache"))
        for name in ("MLAGEN_BUNDLE_PATH", "MLAGEN_JIT", "MLAGEN_TOOLCHAIN"):
            patch.delenv(name, raising=False)
        from programs import SPEC, generated

        from mlagen import binaries
        from mlagen.target import find_target

        for arch in ("gfx942", "gfx950"):
            kernel = generated(arch)
            code_object = binaries.device_binary(SPEC, kernel, find_target(arch), None)
            (folder / "kernels" / f"{kernel.name}.co").write_bytes(code_object)
            (folder / "kernels" / f"{kernel.name}.so").write_bytes(binaries.host_library(SPEC, kernel))
    return StandIn(folder)
