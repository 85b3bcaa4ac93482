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
from mlagen.codegen import GeneratedKernel, generate, variants
from mlagen.errors import MissingKernelError, ToolchainError
from mlagen.layout import Layout
from mlagen.manifest import MANIFEST
from mlagen.resource_usage import read_usage
from mlagen.shipped import Request
from mlagen.spec import PrologueSpec
from mlagen.tables import Entry, Range, choose_ranges, write_table
from mlagen.target import TARGETS

pytestmark = pytest.mark.cuda

ROOT = Path(__file__).resolve().parents[2]
TARGET = TARGETS["sm_90"]


@pytest.fixture(params=[False, True], ids=["plain", "dependent"])
def dependent(request) -> bool:
    """The kernels of load(pdl=...)."""
    return request.param


@pytest.fixture(params=[True, False], ids=["aligned", "unaligned"])
def aligned(request) -> bool:
    return request.param


@pytest.fixture
def generated(spec, dependent, aligned) -> GeneratedKernel:
    return generate(spec, TARGET, layout_for(spec, dependent), aligned=aligned)


def layout_for(spec: PrologueSpec, dependent: bool) -> Layout:
    """What the tables have for the fewest tokens."""
    return choose_ranges(spec, TARGET, dependent=dependent)[0].layout


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


def cubin(bundle: Path, generated: GeneratedKernel) -> bytes:
    return (bundle / f"{generated.name}.cubin").read_bytes()


def edit(bundle: Path, name: str, **changes) -> None:
    """Change fields of an entry of the manifest."""
    data = json.loads((bundle / MANIFEST).read_text())
    data["kernels"][name].update(changes)
    (bundle / MANIFEST).write_text(json.dumps(data))


# Found


@pytest.mark.usefixtures("no_compiler")
class TestFound:
    def test_by_argument(self, spec, bundle, generated):
        assert device_binary(spec, generated, TARGET, bundle) == cubin(bundle, generated)

    def test_by_the_environment(self, spec, bundle, generated, monkeypatch):
        monkeypatch.setenv("MLAGEN_BUNDLE_PATH", str(bundle))
        assert device_binary(spec, generated, TARGET, None) == cubin(bundle, generated)

    def test_whatever_the_number_of_heads(self, spec, bundle, dependent, aligned):
        """For which the tables may choose other layouts, but a layout that both have is the same kernel."""
        other = replace(spec, heads=7)
        generated = generate(other, TARGET, layout_for(spec, dependent), aligned=aligned)
        assert device_binary(other, generated, TARGET, bundle) == cubin(bundle, generated)


@pytest.fixture
def loaded(monkeypatch) -> list[tuple]:
    """What load() gives the driver from now on, for a GPU that is not there."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("cuda.bindings")
    from mlagen import runtime
    from mlagen.drivers import cuda

    given: list[tuple] = []
    monkeypatch.setattr(cuda, "CudaModule", lambda *arguments, **options: given.append((*arguments, options)))
    monkeypatch.setattr(runtime, "_resolve", lambda device, arch: (torch.device(device), TARGET))
    monkeypatch.setattr(runtime, "_KERNELS", {})
    monkeypatch.setattr(runtime, "Kernel", lambda *arguments: arguments)  # which would put the unit scales on the GPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return given


STAGED = PrologueSpec(heads=2, nope_dim=32, lora_rank=128, rope_dim=16, rope_style="gptj")
RANGES = {
    False: (Range(8, Layout()), Range(64, Layout(4, 16), 2), Range(None, Layout(4, 32))),
    True: (Range(16, Layout(1, None, True)), Range(32, Layout(4, 16, True)), Range(None, Layout(4, 16, True), 2)),
}


@pytest.fixture(scope="session")
def tuned(tmp_path_factory) -> Path:
    """A bundle of STAGED for the layouts of RANGES, and the table that has them; not to be written to."""
    folder = tmp_path_factory.mktemp("tuned")
    entries = [Entry(32, 128, 2, dependent, ranges) for dependent, ranges in RANGES.items()]
    (folder / "table.json").write_text(write_table("sm_90", "a test", entries))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLAGEN_TABLES", str(folder / "table.json"))
        build([Request("small", 1, STAGED, TARGET)], folder / "bundle", progress=lambda *_: None)
    return folder


@pytest.mark.usefixtures("no_compiler")
def test_load_finds_every_layout_of_the_tables(tuned, dependent, loaded, monkeypatch):
    """Those for aligned rows at once, the others when a call brings such rows, each as the driver has to load it."""
    from mlagen.runtime import load

    monkeypatch.setenv("MLAGEN_TABLES", str(tuned / "table.json"))
    _, _, where, found = load(STAGED, "cuda:3", bundle=tuned / "bundle", pdl=dependent)
    assert [each.range for each in found] == list(RANGES[dependent])
    layouts = list(dict.fromkeys(each.layout for each in RANGES[dependent]))
    expected = [generate(STAGED, TARGET, layout, aligned=aligned) for aligned in (True, False) for layout in layouts]
    assert len(loaded) == len(layouts)
    for each in found:
        each.module()
        each.unaligned()
    assert [name for _, name, _, _ in loaded] == [each.name for each in expected]
    for (binary, _, index, options), generated in zip(loaded, expected, strict=True):
        assert (binary, index) == (cubin(tuned / "bundle", generated), where.index)
        shared_limit = TARGET.lds_bytes if generated.schedule.staging else 0
        assert options == {"shared_limit": shared_limit, "dependent": dependent}


@pytest.mark.usefixtures("no_compiler", "loaded")
def test_a_layout_that_the_bundle_lacks_is_missed_by_load(tuned, tmp_path, monkeypatch):
    """And not in the middle of serving, by the first call with so many tokens."""
    from mlagen.runtime import load

    ranges = (Range(8, Layout()), Range(None, Layout(2)))
    (tmp_path / "table.json").write_text(write_table("sm_90", "a test", [Entry(32, 128, 2, False, ranges)]))
    monkeypatch.setenv("MLAGEN_TABLES", str(tmp_path / "table.json"))
    with pytest.raises(MissingKernelError, match=r"kernel \S+_w2 is not built, .*bundle does not have it"):
        load(STAGED, "cuda:3", bundle=tuned / "bundle")


def test_in_a_process_where_there_is_no_compiler_at_all(spec, bundle, run):
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
    assert found.split() == [str(len(cubin(bundle, each))) for each in variants(spec, TARGET)]


def test_the_compiler_writes_the_same_bytes_where_it_runs(spec, bundle, generated):
    assert device_binary(spec, generated, TARGET, None) == cubin(bundle, generated)


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


@pytest.mark.parametrize(("break_", "reason"), UNFIT.values(), ids=UNFIT.keys())
def test_an_unfit_kernel_is_passed_over(spec, bundle, built, no_compiler, generated, break_, reason):
    """And the other kernels of the bundle are as good as before."""
    break_(bundle, generated.name)
    with pytest.raises(MissingKernelError, match=f"kernel {generated.name} is not built, .*{reason}"):
        device_binary(spec, generated, TARGET, bundle)
    assert device_binary(spec, generated, TARGET, [bundle, built]) == cubin(built, generated)
    others = [each for each in variants(spec, TARGET) if each.name != generated.name]
    assert len(others) >= 3
    for other in others:
        assert device_binary(spec, other, TARGET, bundle) == cubin(built, other)


def test_the_command_in_the_error_builds_what_is_missing(monkeypatch, tmp_path, dependent, aligned):
    spec = PrologueSpec.from_model("minicpm3", tp=2)
    generated = generate(spec, TARGET, layout_for(spec, dependent), aligned=aligned)
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
    assert device_binary(spec, generated, TARGET, None) == cubin(tmp_path / "made", generated)


# The cache


def test_a_cubin_is_compiled_once_and_described(spec, monkeypatch):
    made = {each.name: device_binary(spec, each, TARGET, None) for each in variants(spec, TARGET)}
    assert len(set(made.values())) == len(list(DiskCache().entries())) == len(made) >= 4
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
