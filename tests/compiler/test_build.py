"""build: requests become sources, code objects and a manifest that is right, and nothing becomes half of that."""

import contextlib
import dataclasses
import hashlib
import json
import os
import struct
import threading
from collections import Counter
from pathlib import Path

import pytest
from cli.command import finish, start

from mlagen import build as builder
from mlagen import codegen
from mlagen.build import build
from mlagen.errors import BuildError, RequestError, ToolchainError
from mlagen.shipped import ARCHS, Request, request
from mlagen.target import find_target
from mlagen.toolchain import compiler_identity

pytestmark = pytest.mark.compiler

E_FLAGS = {"gfx942": 0x54C, "gfx950": 0x54F}
RESOURCES = ["vgprs", "agprs", "sgprs", "lds_bytes", "scratch_bytes", "vgpr_spills", "sgpr_spills", "waves_per_simd"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for variable in ("MLAGEN_TOOLCHAIN", "ROCM_PATH"):
        monkeypatch.delenv(variable, raising=False)


def deepseek(tp: int = 8, arch: str = "gfx950", **options) -> Request:
    return request("deepseek-r1", tp, find_target(arch), **options)


def minicpm3(arch: str = "gfx950") -> Request:
    return request("minicpm3", 8, find_target(arch))


def make(out: Path, *requests: Request, **options) -> dict[str, dict]:
    """Build `requests` to `out`; what the manifest lists then."""
    build(requests, out, progress=lambda name, done, total: None, **options)
    return listed(out)


def listed(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "manifest.json").read_text())["kernels"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """DeepSeek-R1 at TP 8 for both archs; tests leave it as it is."""
    out = tmp_path_factory.mktemp("built")
    make(out, deepseek(arch="gfx942"), deepseek(arch="gfx950"))
    return out


# What is written


def test_the_files_are_those_of_the_manifest(built):
    files = contents(built)
    del files["manifest.json"]
    described = {entry[kind]["file"]: entry[kind]["sha256"] for entry in listed(built).values() for kind in ("source", "binary")}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == described
    assert Counter(Path(name).suffix for name in files) == {".hip": 2, ".co": 2}


@pytest.mark.parametrize("arch", ARCHS)
def test_an_entry_describes_its_kernel(arch, built):
    (name,) = (name for name in listed(built) if name.endswith(arch))
    entry, wanted = listed(built)[name], deepseek(arch=arch)
    assert entry["arch"] == arch
    assert entry["spec"] == dataclasses.asdict(wanted.spec)
    assert entry["serves"] == [{"model": "deepseek-r1", "tp": 8, "heads": 16}]
    assert entry["binary"]["compiler"] == compiler_identity("zig")
    assert entry["source"]["file"] == f"{name}.hip"
    assert entry["binary"]["file"] == f"{name}.co"
    resources = entry["resources"]
    assert all(type(resources[field]) is int for field in RESOURCES)
    assert resources["vgprs"] > 0 < resources["waves_per_simd"]
    assert resources["scratch_bytes"] == resources["vgpr_spills"] == resources["sgpr_spills"] == 0
    assert entry["instructions"]["total"] > sum(entry["instructions"]["mfma"].values()) > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_a_code_object_is_for_its_arch(arch, built):
    (name,) = (name for name in listed(built) if name.endswith(arch))
    binary = (built / f"{name}.co").read_bytes()
    kind, machine, _, _, _, _, flags = struct.unpack_from("<HHIQQQI", binary, 16)
    assert (binary[:5], kind, machine, flags) == (b"\x7fELF\x02", 3, 224, E_FLAGS[arch])
    assert f"\0{name}.kd\0".encode() in binary  # the descriptor that a loader looks up


def test_a_source_is_the_generated_one(built):
    for name, wanted in zip(sorted(listed(built)), map(deepseek, (8, 8), ARCHS), strict=True):
        generated = codegen.generate(wanted.spec, wanted.target)
        assert generated.name == name
        assert (built / f"{name}.hip").read_text() == generated.source


def test_sources_alone(tmp_path):
    (name,) = make(tmp_path, minicpm3(), sources_only=True)
    assert contents(tmp_path).keys() == {f"{name}.hip", "manifest.json"}
    assert listed(tmp_path)[name]["binary"].keys() == {"compiler", "sha256"}


# The same request, the same bytes


def test_building_again_changes_nothing(built):
    before = contents(built)
    make(built, deepseek(arch="gfx942"), deepseek(arch="gfx950"))
    assert contents(built) == before


def test_the_surroundings_change_nothing(built, tmp_path):
    """Neither the hash seed, the folder, the time zone and the language, nor the number of cores."""
    arguments = ("build", "deepseek-r1", "--tp", "8", "--arch", "gfx942", "--arch", "gfx950", "--out")
    processes = []
    for seed in ("0", "1"):
        place = tmp_path / f"place {seed}"
        place.mkdir()
        surroundings = {"PYTHONHASHSEED": seed, "TMPDIR": str(place), "TZ": f"UTC{seed}", "LC_ALL": "C", "HOME": str(place)}
        core = min(os.sched_getaffinity(0))
        through = ("taskset", "-c", str(core)) if seed == "1" and _has_taskset() else ()
        processes.append(start(*arguments, "out", through=through, cwd=place, environment=surroundings))
    assert [finish(process).status for process in processes] == [0, 0]
    for seed in ("0", "1"):
        assert contents(tmp_path / f"place {seed}" / "out") == contents(built)


def _has_taskset() -> bool:
    return any((Path(folder) / "taskset").exists() for folder in os.get_exec_path())


# Kernels that coincide, folders that grow


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The names of the kernels that were compiled, as they are."""
    names = []
    compile_device = builder.compile_device
    monkeypatch.setattr(
        builder,
        "compile_device",
        lambda source, arch, *, name, toolchain: names.append(name) or compile_device(source, arch, name=name, toolchain=toolchain),
    )
    return names


def test_kernels_that_coincide_are_built_once(tmp_path, compiled):
    requests = [deepseek(8), deepseek(4), request("kimi-k2", 8, find_target("gfx950")), deepseek(8)]
    progress = []
    build(requests, tmp_path, progress=lambda *done: progress.append(done))
    (name,) = listed(tmp_path)
    assert compiled == [name]
    assert progress == [(name, 1, 1)]
    served = [(each["model"], each["tp"], each["heads"]) for each in listed(tmp_path)[name]["serves"]]
    assert served == [("deepseek-r1", 8, 16), ("deepseek-r1", 4, 32), ("kimi-k2", 8, 8)]


def test_a_folder_keeps_what_it_had(tmp_path):
    (tmp_path / "notes").write_text("mine")
    first = make(tmp_path, minicpm3("gfx942"))
    before = contents(tmp_path)
    both = make(tmp_path, minicpm3("gfx950"))
    assert len(both) == 2
    assert both.items() >= first.items()
    after = contents(tmp_path)
    del before["manifest.json"]
    assert after.items() >= before.items()
    assert len(after) == 6


def test_serves_grows(tmp_path):
    (first,) = make(tmp_path, deepseek(8)).values()
    (second,) = make(tmp_path, deepseek(4)).values()
    (third,) = make(tmp_path, deepseek(8)).values()
    assert [each["tp"] for each in first["serves"]] == [8]
    assert [each["tp"] for each in second["serves"]] == [8, 4]
    assert third["serves"] == second["serves"]


def test_two_builds_at_once_lose_nothing(tmp_path, monkeypatch):
    """Both have looked at the folder before either writes."""
    meeting = threading.Barrier(2, timeout=60)
    compile_all = builder.compile_all

    def compile_together(*args):
        built = compile_all(*args)
        meeting.wait()
        return built

    monkeypatch.setattr(builder, "compile_all", compile_together)
    threads = [threading.Thread(target=make, args=(tmp_path / "new", minicpm3(arch))) for arch in ARCHS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert {entry["arch"] for entry in listed(tmp_path / "new").values()} == set(ARCHS)
    assert len(contents(tmp_path / "new")) == 5


def test_progress_is_in_order(tmp_path):
    seen = []
    requests = [minicpm3("gfx950"), deepseek(8), minicpm3("gfx942")]
    build(requests, tmp_path, progress=lambda *done: seen.append(done))
    names = [codegen.generate(each.spec, each.target).name for each in requests]
    assert seen == [(name, number, 3) for number, name in enumerate(names, start=1)]


# What goes wrong


@pytest.fixture
def replaced(monkeypatch):
    """Replaces the source of each kernel by what a function of its name gives."""

    def replace(text):
        variants = builder.variants
        monkeypatch.setattr(
            builder,
            "variants",
            lambda spec, target: [
                dataclasses.replace(kernel, texts=lambda _, kernel=kernel: text(kernel)) for kernel in variants(spec, target)
            ],
        )

    return replace


@contextlib.contextmanager
def changes_nothing(folder: Path):
    before = sorted((path, path.is_file() and path.read_bytes()) for path in folder.rglob("*"))
    yield
    assert sorted((path, path.is_file() and path.read_bytes()) for path in folder.rglob("*")) == before


SPILLING = """\
extern "C" __attribute__((global)) void NAME(int* out, int n)
{
    int kept[64];
    for (int i = 0; i < n; ++i) kept[(i * n) & 63] = i;
    out[n] = kept[n & 63];
}
"""


def test_scratch_memory_fails_the_build(tmp_path, replaced):
    replaced(lambda kernel: SPILLING.replace("NAME", kernel.name))
    with changes_nothing(tmp_path), pytest.raises(BuildError, match=r"fused_gfx950: \d{3} bytes of scratch memory per lane"):
        make(tmp_path / "new", minicpm3())


def test_a_bad_kernel_stops_the_others(tmp_path, replaced, compiled, monkeypatch):
    replaced(lambda kernel: kernel.source.replace("{", "", 1) if kernel.arch == "gfx942" else kernel.source)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    others = [deepseek(8, rounding="stepwise", fp8_max=limit) for limit in range(1, 17)]
    with pytest.raises(BuildError, match=r"gfx942\.hip:.* error: "):
        make(tmp_path / "new", minicpm3("gfx942"), *others)
    assert len(compiled) < 1 + len(others)
    assert not (tmp_path / "new").exists()


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def interrupt(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with changes_nothing(tmp_path), pytest.raises(KeyboardInterrupt):
        build([minicpm3(), deepseek(8)], tmp_path / "new", progress=interrupt)


def test_a_full_disk_leaves_what_was_there(built, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with changes_nothing(built), pytest.raises(BuildError, match=r"No space left on device; .*; free some space"):
        make(built, minicpm3())


def test_a_manifest_that_is_not_ours_is_seen_first(tmp_path, compiled):
    (tmp_path / "manifest.json").write_text("{}")
    with changes_nothing(tmp_path), pytest.raises(RequestError, match="manifest format None"):
        make(tmp_path, minicpm3())
    assert not compiled


# Toolchains


def test_the_environment_chooses_the_toolchain(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    monkeypatch.setenv("MLAGEN_TOOLCHAIN", "rocm")
    with changes_nothing(tmp_path), pytest.raises(ToolchainError, match="no ROCm compiler"):
        make(tmp_path / "new", minicpm3())
    (entry,) = make(tmp_path / "new", minicpm3(), toolchain="zig").values()
    assert entry["binary"]["compiler"] == compiler_identity("zig")
