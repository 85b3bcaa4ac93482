"""Bundles for NVIDIA: every kernel that a call may need is in them, and no compiler is asked; what the cache keeps of a cubin."""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mlagen import cuda_toolchain, toolchain
from mlagen.binaries import device_binary, device_key
from mlagen.build import build
from mlagen.cache import DiskCache
from mlagen.codegen import generate, variants
from mlagen.errors import MissingKernelError, ToolchainError
from mlagen.manifest import MANIFEST
from mlagen.resource_usage import read_usage
from mlagen.shipped import Request
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS

pytestmark = pytest.mark.cuda

ROOT = Path(__file__).resolve().parents[2]
TARGET = TARGETS["sm_90"]

each_alignment = pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])


@pytest.fixture(scope="session")
def built(tmp_path_factory, spec) -> Path:
    """A bundle of the small spec for sm_90, not to be written to."""
    folder = tmp_path_factory.mktemp("built") / "bundle"
    build([Request("small", 1, spec, TARGET)], folder, progress=lambda *_: None)
    return folder


@pytest.fixture
def bundle(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture
def no_compiler(monkeypatch):
    """MLAGEN_JIT=0, and whoever asks for a compiler, or only for its version, fails."""

    def refuse(*_, **__):
        raise ToolchainError("a compiler was asked for")

    for compiler in (toolchain, cuda_toolchain):
        for name in ("compile_device", "fingerprint"):
            monkeypatch.setattr(compiler, name, refuse)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("MLAGEN_JIT", "0")


def cubin(bundle: Path, aligned: bool) -> bytes:
    (path,) = (path for path in bundle.glob("*.cubin") if path.stem.endswith("_unaligned") != aligned)
    return path.read_bytes()


def edit(bundle: Path, name: str, **changes) -> None:
    """Change fields of an entry of the manifest."""
    data = json.loads((bundle / MANIFEST).read_text())
    data["kernels"][name].update(changes)
    (bundle / MANIFEST).write_text(json.dumps(data))


# Found


@each_alignment
@pytest.mark.usefixtures("no_compiler")
class TestFound:
    def test_by_argument(self, spec, bundle, aligned):
        assert device_binary(spec, generate(spec, TARGET, aligned=aligned), TARGET, bundle) == cubin(bundle, aligned)

    def test_by_the_environment(self, spec, bundle, aligned, monkeypatch):
        monkeypatch.setenv("MLAGEN_BUNDLE_PATH", str(bundle))
        assert device_binary(spec, generate(spec, TARGET, aligned=aligned), TARGET, None) == cubin(bundle, aligned)

    def test_whatever_the_number_of_heads(self, spec, bundle, aligned):
        other = replace(spec, heads=7)
        assert device_binary(other, generate(other, TARGET, aligned=aligned), TARGET, bundle) == cubin(bundle, aligned)

    def test_by_load(self, spec, bundle, aligned, monkeypatch):
        """What load() gives the driver for rows of this alignment."""
        torch = pytest.importorskip("torch")
        pytest.importorskip("cuda.bindings")
        from mlagen import runtime
        from mlagen.drivers import cuda

        given = []
        monkeypatch.setattr(cuda, "CudaModule", lambda *arguments: given.append(arguments))
        runtime._load_module(spec, TARGET, torch.device("cuda", 3), bundle, generate(spec, TARGET, aligned=aligned))
        assert given == [(cubin(bundle, aligned), generate(spec, TARGET, aligned=aligned).name, 3)]


def test_in_a_process_where_there_is_no_compiler_at_all(bundle, run):
    code = """
import sys
sys.modules.update(dict.fromkeys(("cuda", "ziglang")))
from mlagen.binaries import device_binary
from mlagen.codegen import variants
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS
spec = PrologueSpec(heads=2, nope_dim=32, lora_rank=64, rope_dim=16, rope_style="gptj")
print(*(len(device_binary(spec, each, TARGETS["sm_90"], None)) for each in variants(spec, TARGETS["sm_90"])))
"""
    found = run(code, MLAGEN_BUNDLE_PATH=str(bundle), MLAGEN_JIT="0", PATH="")
    assert found.split() == [str(len(cubin(bundle, aligned))) for aligned in (True, False)]


@each_alignment
def test_the_compiler_writes_the_same_bytes_where_it_runs(spec, bundle, aligned):
    assert device_binary(spec, generate(spec, TARGET, aligned=aligned), TARGET, None) == cubin(bundle, aligned)


# Unfit


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


UNFIT = {
    "stale": (lambda bundle, name: edit(bundle, name, source={"sha256": "0" * 64}, mlagen="0.0.9"), r"another version.*0\.0\.9"),
    "another arch": (lambda bundle, name: edit(bundle, name, arch="gfx950"), "has it for gfx950"),
    "damaged": (lambda bundle, name: flip(bundle / f"{name}.cubin"), r"damaged: \S+\.cubin is not what was built"),
    "missing": (lambda bundle, name: (bundle / f"{name}.cubin").unlink(), r"damaged: \S+\.cubin: No such file"),
}


@each_alignment
@pytest.mark.parametrize(("break_", "reason"), UNFIT.values(), ids=UNFIT.keys())
def test_an_unfit_kernel_is_passed_over(spec, bundle, built, no_compiler, aligned, break_, reason):
    """And the other kernel of the bundle is as good as before."""
    ours, other = (generate(spec, TARGET, aligned=each) for each in (aligned, not aligned))
    break_(bundle, ours.name)
    with pytest.raises(MissingKernelError, match=f"kernel {ours.name} is not built, .*{reason}"):
        device_binary(spec, ours, TARGET, bundle)
    assert device_binary(spec, ours, TARGET, [bundle, built]) == cubin(built, aligned)
    assert device_binary(spec, other, TARGET, bundle) == cubin(built, not aligned)


@each_alignment
def test_the_command_in_the_error_builds_what_is_missing(monkeypatch, tmp_path, aligned):
    spec = PrologueSpec.from_model("minicpm3", tp=2)
    generated = generate(spec, TARGET, aligned=aligned)
    monkeypatch.setenv("MLAGEN_JIT", "0")
    with pytest.raises(MissingKernelError) as caught:
        device_binary(spec, generated, TARGET, None)
    command = re.search("`(mlagen build .*?)`", str(caught.value)).group(1)
    assert "--arch sm_90" in command
    words = shlex.split(command.replace("DIR", str(tmp_path / "made")))[1:]
    subprocess.run(
        [sys.executable, "-c", "from mlagen.cli import main; main()", *words],
        check=True, capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    monkeypatch.setenv("MLAGEN_BUNDLE_PATH", str(tmp_path / "made"))
    assert device_binary(spec, generated, TARGET, None) == cubin(tmp_path / "made", aligned)


# The cache


def test_a_cubin_is_compiled_once_and_described(spec, monkeypatch):
    made = {each.name: device_binary(spec, each, TARGET, None) for each in variants(spec, TARGET)}
    assert len(set(made.values())) == len(list(DiskCache().entries())) == 2
    for each in variants(spec, TARGET):
        entry, _ = DiskCache().read(device_key(each, TARGET))
        compiled = cuda_toolchain.compile_device(each.source, "sm_90", name=each.name)
        assert entry.binary == made[each.name] == compiled.binary
        assert entry.meta["resources"] == asdict(read_usage(compiled.usage, each.name))
        assert entry.meta["compiler"] == compiled.compiler
    monkeypatch.setattr(cuda_toolchain, "compile_device", pytest.fail)
    monkeypatch.setenv("MLAGEN_JIT", "0")
    assert {each.name: device_binary(spec, each, TARGET, None) for each in variants(spec, TARGET)} == made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda usage: usage.replace(" 0 bytes stack frame", " 24 bytes stack frame"), "24 bytes of local memory"),
        (lambda usage: "", "ptxas does not tell its resources"),
    ],
    ids=["spills", "untold"],
)
def test_a_kernel_that_a_build_refuses_is_reported_and_served(spec, monkeypatch, caplog, change, words):
    generated = generate(spec, TARGET)
    compiled = cuda_toolchain.compile_device(generated.source, "sm_90", name=generated.name)
    spilled = replace(compiled, usage=change(compiled.usage))
    monkeypatch.setattr(cuda_toolchain, "compile_device", lambda *_, **__: spilled)
    with caplog.at_level(logging.WARNING, "mlagen"):
        assert device_binary(spec, generated, TARGET, None) == compiled.binary
    (record,) = caplog.records
    assert words in record.getMessage()
