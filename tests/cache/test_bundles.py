"""Bundles: found by argument and by MLAGEN_BUNDLE_PATH, served without a compiler, passed over where unfit."""

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

from mlagen import toolchain
from mlagen.binaries import device_binary, device_key, jit_allowed
from mlagen.build import build
from mlagen.cache import DiskCache
from mlagen.codegen import generate
from mlagen.errors import MissingKernelError, RequestError, ToolchainError
from mlagen.machine_code import read_resources
from mlagen.manifest import MANIFEST, damaged_files, read_manifest
from mlagen.shipped import Request
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS
from mlagen.toolchain import compile_device

ROOT = Path(__file__).resolve().parents[2]
TARGET = TARGETS["gfx950"]


@pytest.fixture(scope="session")
def built(tmp_path_factory, spec) -> Path:
    """A bundle of the small kernel for gfx950, not to be written to."""
    folder = tmp_path_factory.mktemp("built") / "bundle"
    build([Request("small", 1, spec, TARGET)], folder, progress=lambda *_: None)
    return folder


@pytest.fixture
def bundle(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture
def generated(spec):
    return generate(spec, TARGET)


@pytest.fixture
def no_compiler(monkeypatch):
    """Whoever asks for a compiler, or only for its version, fails."""

    def refuse(*_, **__):
        raise ToolchainError("a compiler was asked for")

    for name in ("compile_device", "compile_host", "fingerprint", "host_fingerprint", "compiler_identity", "host_compiler"):
        monkeypatch.setattr(toolchain, name, refuse)
    monkeypatch.setenv("PATH", "")


def edit(bundle: Path, **changes) -> None:
    """Change fields of the only entry of the manifest."""
    data = json.loads((bundle / MANIFEST).read_text())
    (entry,) = data["kernels"].values()
    entry.update(changes)
    (bundle / MANIFEST).write_text(json.dumps(data))


def code_object(bundle: Path) -> bytes:
    (path,) = bundle.glob("*.co")
    return path.read_bytes()


pytestmark = pytest.mark.compiler


@pytest.mark.usefixtures("no_compiler")
class TestFound:
    def test_by_argument(self, spec, generated, bundle):
        for named in (bundle, str(bundle), [bundle], (str(bundle),)):
            assert device_binary(spec, generated, TARGET, named) == code_object(bundle)

    def test_by_the_environment(self, spec, generated, bundle, tmp_path, monkeypatch):
        empty = tmp_path / "empty"
        build([], empty, progress=lambda *_: None)
        monkeypatch.setenv("MLAGEN_BUNDLE_PATH", os.pathsep.join(["", str(empty), str(bundle), ""]))
        assert device_binary(spec, generated, TARGET, None) == code_object(bundle)
        assert device_binary(spec, generated, TARGET, empty) == code_object(bundle)

    def test_whatever_the_number_of_heads(self, spec, bundle):
        other = replace(spec, heads=7)
        assert device_binary(other, generate(other, TARGET), TARGET, bundle) == code_object(bundle)

    def test_the_argument_comes_first(self, spec, generated, bundle, tmp_path, monkeypatch):
        second = Path(shutil.copytree(bundle, tmp_path / "second"))
        (path,) = second.glob("*.co")
        path.write_bytes(b"another build")
        edit(second, binary={"file": path.name, "sha256": "d3c66dcdbf5137b92d3d1d5e2c2d3b0e0bf1b2e7f5d5b7a0f6f0d4d7e6f5c4b3"})
        monkeypatch.setenv("MLAGEN_BUNDLE_PATH", str(second))
        assert device_binary(spec, generated, TARGET, bundle) == code_object(bundle)

    def test_the_cache_is_left_alone(self, spec, generated, bundle, cache_root):
        device_binary(spec, generated, TARGET, bundle)
        assert not cache_root.exists()

    def test_in_a_process_where_there_is_no_compiler_at_all(self, bundle, run):
        code = """
import sys
sys.modules["ziglang"] = None
from mlagen.binaries import device_binary
from mlagen.codegen import generate
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS
spec = PrologueSpec(heads=2, nope_dim=32, lora_rank=64, rope_dim=16, rope_style="gptj")
binary = device_binary(spec, generate(spec, TARGETS["gfx950"]), TARGETS["gfx950"], None)
print(len(binary), "torch" in sys.modules)
"""
        found = run(code, MLAGEN_BUNDLE_PATH=str(bundle), MLAGEN_JIT="0", PATH="")
        assert found.split() == [str(len(code_object(bundle))), "False"]


# Bundles that do not fit


def remove(bundle: Path, pattern: str) -> None:
    for path in bundle.glob(pattern):
        path.unlink()


def flip(bundle: Path) -> None:
    (path,) = bundle.glob("*.co")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def make_stale(bundle: Path) -> None:
    edit(bundle, source={"file": "k.hip", "sha256": "0" * 64}, mlagen="0.0.9")


UNFIT = {
    "stale": (make_stale, r"as another version of mlagen generated it \(0.0.9\)"),
    "another abi": (lambda bundle: edit(bundle, abi=0), "another version"),
    "another arch": (lambda bundle: edit(bundle, arch="gfx942"), "has it for gfx942"),
    "damaged": (flip, r"damaged: mla_prologue\S*.co is not what was built, its sha256 differs"),
    "truncated": (lambda bundle: os.truncate(next(bundle.glob("*.co")), 100), "sha256 differs"),
    "missing": (lambda bundle: remove(bundle, "*.co"), r"damaged: mla_prologue\S*.co: No such file"),
    "sources": (lambda bundle: edit(bundle, binary={"sha256": "0" * 64, "compiler": "zig"}), "its source only"),
}


@pytest.mark.parametrize(("break_", "reason"), UNFIT.values(), ids=UNFIT.keys())
class TestUnfit:
    def test_is_passed_over_with_a_reason(self, spec, generated, bundle, caplog, break_, reason):
        expected = code_object(bundle)
        break_(bundle)
        with caplog.at_level(logging.WARNING, "mlagen"):
            assert device_binary(spec, generated, TARGET, bundle) == expected  # the compiler writes the same bytes again
        (record,) = caplog.records
        assert re.search(f"{generated.name}: bundle {re.escape(str(bundle))} .*{reason}", record.getMessage())

    def test_is_an_error_without_jit(self, spec, generated, bundle, monkeypatch, no_compiler, break_, reason):
        monkeypatch.setenv("MLAGEN_JIT", "0")
        break_(bundle)
        with pytest.raises(MissingKernelError, match=reason):
            device_binary(spec, generated, TARGET, bundle)

    def test_is_skipped_for_the_next_bundle(self, spec, generated, bundle, built, no_compiler, break_, reason):
        break_(bundle)
        assert device_binary(spec, generated, TARGET, [bundle, built]) == code_object(built)


@pytest.mark.parametrize(
    "text", [None, "", "[]", '{"format": 1, "kernels": {"k": {"source": {}, "binary": []}}}', '{"format": 99}']
)
def test_a_folder_that_is_no_bundle_is_an_error(spec, generated, tmp_path, text):
    """Asked for by name, a bundle without a readable manifest is a mistake, not a miss."""
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(RequestError, match=re.escape(str(tmp_path))):
        device_binary(spec, generated, TARGET, tmp_path)


def test_inspect_sees_the_same_damage(bundle):
    assert damaged_files(bundle, read_manifest(bundle)) == []
    flip(bundle)
    (line,) = damaged_files(bundle, read_manifest(bundle))
    assert "sha256 differs" in line


# MLAGEN_JIT=0


@pytest.mark.parametrize(("text", "allowed"), [(None, True), ("", True), ("1", True), ("0", False)])
def test_jit(monkeypatch, text, allowed):
    monkeypatch.setenv("MLAGEN_JIT", text) if text is not None else monkeypatch.delenv("MLAGEN_JIT", raising=False)
    assert jit_allowed() is allowed


@pytest.mark.parametrize("text", ["no", "false", "2", " 0"])
def test_jit_of_another_value_is_an_error(monkeypatch, text):
    monkeypatch.setenv("MLAGEN_JIT", text)
    with pytest.raises(RequestError, match=r"MLAGEN_JIT=.*expected 0 or 1"):
        jit_allowed()


def test_without_jit_and_compiler_the_error_names_the_kernel_and_the_command(spec, generated, monkeypatch, no_compiler):
    monkeypatch.setenv("MLAGEN_JIT", "0")
    with pytest.raises(MissingKernelError) as caught:
        device_binary(spec, generated, TARGET, None)
    message = str(caught.value)
    assert generated.name in message
    assert "MLAGEN_JIT=0" in message
    assert "mlagen build MODEL --arch gfx950" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_dtype": "bf16", "kv_dtype": "bf16"},
        {"weight": "none"},
        {"rounding": "stepwise", "fp8_max": 224},
        {"nope_first": False},
        {"kv_layout": "segmented"},
        {"kv_layout": "fp8_ds_mla"},
        {"kv_heads": 2},
        {"q_scaling": "token"},
        {"q_split": True},
        {"write_q": False},
        {"write_kv": False},
    ],
    ids=[
        *("fp8", "bf16", "no weight", "stepwise", "rope first", "segmented", "fp8_ds_mla", "KV heads"),
        *("token", "split", "no query", "no cache"),
    ],
)
def test_the_command_in_the_error_builds_the_missing_kernel(monkeypatch, tmp_path, options):
    spec = PrologueSpec.from_model("minicpm3", tp=2, **options)
    generated = generate(spec, TARGETS["gfx942"])
    monkeypatch.setenv("MLAGEN_JIT", "0")
    with pytest.raises(MissingKernelError) as caught:
        device_binary(spec, generated, TARGETS["gfx942"], None)
    command = re.search("`(mlagen build .*?)`", str(caught.value)).group(1)
    words = shlex.split(command.replace("DIR", str(tmp_path / "made")))[1:]
    subprocess.run(
        [sys.executable, "-c", "from mlagen.cli import main; main()", *words],
        check=True, capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    monkeypatch.setenv("MLAGEN_BUNDLE_PATH", str(tmp_path / "made"))
    assert device_binary(spec, generated, TARGETS["gfx942"], None) == code_object(tmp_path / "made")


# The cache of device binaries


def test_a_code_object_is_compiled_once_and_described(spec, generated, monkeypatch):
    binary = device_binary(spec, generated, TARGET, None)
    entry, _ = DiskCache().read(device_key(generated, TARGET))
    compiled = compile_device(generated.source, "gfx950", name=generated.name)
    assert entry.binary == binary == compiled.binary
    assert entry.meta["resources"] == asdict(read_resources(compiled.assembly, generated.name))
    assert entry.meta["command"] == compiled.command
    assert entry.meta["compiler"] == compiled.compiler
    assert PrologueSpec(**entry.meta["spec"]) == spec
    monkeypatch.setattr(toolchain, "compile_device", pytest.fail)
    assert device_binary(spec, generated, TARGET, None) == binary
    monkeypatch.setenv("MLAGEN_JIT", "0")
    assert device_binary(spec, generated, TARGET, None) == binary


def test_two_archs_are_two_entries(spec):
    made = {arch: device_binary(spec, generate(spec, TARGETS[arch]), TARGETS[arch], None) for arch in ("gfx942", "gfx950")}
    assert len(list(DiskCache().entries())) == 2
    assert made["gfx942"] != made["gfx950"]


def test_a_kernel_that_spills_is_reported_and_served(spec, generated, monkeypatch, caplog):
    monkeypatch.setattr(
        toolchain,
        "compile_device",
        lambda *arguments, **options: (
            (made := compile_device(*arguments, **options))
            and replace(made, assembly=re.sub(r"(\.vgpr_spill_count:\s+)0", r"\g<1>7", made.assembly))
        ),
    )
    with caplog.at_level(logging.WARNING, "mlagen"):
        assert device_binary(spec, generated, TARGET, None)
    assert "7 spilled VGPRs" in caplog.text
