"""build for NVIDIA: all kernels of a request, their cubins, what they cost, and what the command line shows of that."""

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from cli.command import Result, run

from mlagen import build as builder
from mlagen import cuda_toolchain
from mlagen.build import build
from mlagen.codegen import variants
from mlagen.errors import BuildError, ToolchainError
from mlagen.models import PRESETS
from mlagen.schedule import WAVES_PER_SIMD_GOAL
from mlagen.shipped import Request, request
from mlagen.tables import choose_ranges
from mlagen.target import find_target

SM_90 = find_target("sm_90")
FIELDS = ["registers", "shared_bytes", "local_bytes", "spill_store_bytes", "spill_load_bytes", "waves_per_simd"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for variable in ("MLAGEN_TOOLCHAIN", "MLAGEN_CUDA_TOOLCHAIN", "ROCM_PATH"):
        monkeypatch.delenv(variable, raising=False)


def minicpm3(arch: str = "sm_90", tp: int = 8) -> Request:
    return request("minicpm3", tp, find_target(arch))


KERNELS = {kernel.name: kernel for kernel in variants(minicpm3().spec, SM_90)}
"""What minicpm3() needs, by name: for each layout of the tables, those of dependent launch too, aligned rows and others."""

FIRST, *_, LAST = KERNELS


def make(out: Path, *requests: Request, **options) -> dict[str, dict]:
    """Build `requests` to `out`; what the manifest lists then."""
    build(requests, out, progress=lambda name, done, total: None, **options)
    return json.loads((out / "manifest.json").read_text())["kernels"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """MiniCPM3 at TP 8 for sm_90; tests leave it as it is."""
    out = tmp_path_factory.mktemp("built")
    make(out, minicpm3())
    return out


@pytest.fixture
def entries(built) -> dict[str, dict]:
    return json.loads((built / "manifest.json").read_text())["kernels"]


# What is written


def test_there_is_a_kernel_for_every_use():
    """For each layout that the tables choose, aligned rows and others."""
    wanted = Counter()
    for dependent in (False, True):
        layouts = {each.layout for each in choose_ranges(minicpm3().spec, SM_90, dependent=dependent)}
        wanted.update({(dependent, unaligned): len(layouts) for unaligned in (False, True)})
    assert Counter((kernel.dependent, name.endswith("_unaligned")) for name, kernel in KERNELS.items()) == wanted


@pytest.mark.cuda
def test_every_kernel_is_there(built, entries):
    files = contents(built)
    del files["manifest.json"]
    described = {entry[kind]["file"]: entry[kind]["sha256"] for entry in entries.values() for kind in ("source", "binary")}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == described
    assert sorted(files) == sorted(f"{name}.{suffix}" for name in KERNELS for suffix in ("cubin", "hip"))
    for name, kernel in KERNELS.items():
        assert files[f"{name}.hip"].decode() == kernel.source


@pytest.mark.cuda
@pytest.mark.parametrize("name", KERNELS, ids=lambda name: name.rpartition("sm_90")[2] or "plain")
def test_an_entry_describes_its_kernel(name, built, entries):
    entry = entries[name]
    assert entry["arch"] == "sm_90"
    assert entry["spec"] == dataclasses.asdict(minicpm3().spec)
    assert entry["serves"] == [{"model": "minicpm3", "tp": 8, "heads": 5}]
    assert entry["schedule"]["waves_per_workgroup"] == KERNELS[name].schedule.waves_per_workgroup
    assert entry["binary"]["compiler"] == version("auto")
    assert sorted(entry["resources"]) == sorted(FIELDS)
    assert 24 <= entry["resources"]["registers"] <= 128
    assert entry["resources"]["waves_per_simd"] == SM_90.waves_per_simd(entry["resources"]["registers"])
    assert [entry["resources"][field] for field in FIELDS[1:-1]] == [0, 0, 0, 0]
    assert entry["instructions"] == {}
    assert name.encode() in (built / entry["binary"]["file"]).read_bytes()


def version(toolchain: str) -> str:
    """What the compiler of that name calls itself."""
    return {"nvrtc": cuda_toolchain.nvrtc_version, "nvcc": cuda_toolchain.nvcc_identity}[cuda_toolchain._chosen(toolchain)]()


@pytest.mark.cuda
@pytest.mark.parametrize("toolchain", ["nvrtc", "nvcc"])
@pytest.mark.parametrize("by", ["option", "variable"])
def test_the_toolchain_that_is_named_compiles(toolchain, by, tmp_path, monkeypatch):
    try:
        identity = version(toolchain)
    except ToolchainError:
        pytest.skip(toolchain)
    options = {"toolchain": toolchain} if by == "option" else {}
    monkeypatch.setenv("MLAGEN_CUDA_TOOLCHAIN", {"nvrtc": "nvcc", "nvcc": "nvrtc"}[toolchain] if options else toolchain)
    monkeypatch.setattr(builder, "variants", lambda spec, target: variants(spec, target)[:2])  # nvcc takes its time
    made = make(tmp_path, minicpm3(), **options)
    assert [entry["binary"]["compiler"] for entry in made.values()] == [identity, identity]


@pytest.mark.cuda
@pytest.mark.compiler
def test_both_platforms_share_a_folder(tmp_path, built):
    made = make(tmp_path, minicpm3("gfx950"), minicpm3(), minicpm3("gfx942"))
    ours, amds = len(KERNELS), {arch: len(variants(minicpm3(arch).spec, find_target(arch))) for arch in ("gfx942", "gfx950")}
    assert Counter(entry["arch"] for entry in made.values()) == {**amds, "sm_90": ours}
    amd = sum(amds.values())
    assert Counter(path.suffix for path in tmp_path.iterdir()) == {".hip": amd + ours, ".co": amd, ".cubin": ours, ".json": 1}
    assert contents(tmp_path).items() >= {name: data for name, data in contents(built).items() if name != "manifest.json"}.items()


@pytest.mark.cuda
def test_kernels_that_coincide_are_built_once(tmp_path):
    """Two numbers of heads share a kernel where they have a layout in common."""
    made = make(tmp_path, minicpm3(tp=8), minicpm3(tp=4))
    others = {kernel.name for kernel in variants(minicpm3(tp=4).spec, SM_90)}
    assert made.keys() == KERNELS.keys() | others
    assert KERNELS.keys() & others
    for name, entry in made.items():
        served = {8: name in KERNELS, 4: name in others}
        assert [each["tp"] for each in entry["serves"]] == [tp for tp in (8, 4) if served[tp]]


@pytest.mark.cuda
def test_the_number_of_cores_changes_nothing(built, tmp_path, monkeypatch):
    """Compilers that run in this process at once do not disturb one another."""
    others = [request("deepseek-r1", 8, SM_90, q_dtype=dtype, kv_dtype=dtype) for dtype in ("fp8", "bf16")]
    for cores in (1, 8):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        make(tmp_path / str(cores), minicpm3(), *others)
    assert contents(tmp_path / "1") == contents(tmp_path / "8")
    names = [kernel.name for each in (minicpm3(), *others) for kernel in variants(each.spec, SM_90)]
    assert len(contents(tmp_path / "8")) == 1 + 2 * len(names)
    for name in KERNELS:
        assert contents(tmp_path / "8")[f"{name}.cubin"] == contents(built)[f"{name}.cubin"]


@pytest.mark.cuda
@pytest.mark.slow
def test_every_preset_builds(tmp_path):
    """None spills, on Hopper either, and every workgroup has room on a multiprocessor."""
    requests = [
        request(name, 1, SM_90, q_dtype=dtype, kv_dtype=dtype) for name, shape in PRESETS.items() for dtype in ("fp8", shape.dtype)
    ]
    made = make(tmp_path, *requests)
    kernels = {kernel.name: kernel for each in requests for kernel in variants(each.spec, SM_90)}
    assert made.keys() == kernels.keys()
    for name, entry in made.items():
        absorb, waves = kernels[name].schedule.absorb, entry["resources"]["waves_per_simd"]
        assert waves >= (4 if absorb.nope_dim <= 128 else WAVES_PER_SIMD_GOAL), name
        assert waves * SM_90.simds_per_cu >= entry["schedule"]["waves_per_workgroup"], name
    # The query is staged in what a launch asks for, and this is what is there without asking.
    assert {entry["resources"]["shared_bytes"] for entry in made.values()} == {0}
    assert any(kernel.schedule.staging for kernel in kernels.values())


@pytest.mark.cuda
def test_the_compiler_has_nothing_to_say():
    kernels = [kernel for rounding in ("fused", "stepwise") for kernel in variants(_stepwise(rounding).spec, SM_90)]
    said = {each.name: cuda_toolchain.compile_device(each.source, "sm_90", name=each.name).warnings for each in kernels}
    assert said == dict.fromkeys(said, "")
    assert any(kernel.schedule.staging for kernel in kernels)


def _stepwise(rounding: str) -> Request:
    return request("deepseek-r1", 8, SM_90, rounding=rounding)


# What goes wrong

SPILLING = """\
extern "C" __global__ void NAME(int* out, int n)
{
    int kept[64];
    for (int i = 0; i < n; ++i) kept[(i * n) & 63] = i;
    out[n] = kept[n & 63];
}
"""


@pytest.mark.cuda
@pytest.mark.parametrize("spilling", [FIRST, LAST], ids=["first", "last"])
def test_local_memory_in_any_kernel_fails_the_build(spilling, tmp_path, monkeypatch):
    def spill(spec, target):
        source = SPILLING.replace("NAME", spilling)
        return [
            dataclasses.replace(kernel, texts={"device": source}.__getitem__) if kernel.name == spilling else kernel
            for kernel in variants(spec, target)
        ]

    monkeypatch.setattr(builder, "variants", spill)
    with pytest.raises(BuildError, match=f"^{spilling}: 256 bytes of local memory per lane"):
        make(tmp_path / "new", minicpm3())
    assert not (tmp_path / "new").exists()


def test_no_compiler_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_toolchain, "_load_nvrtc", lambda: None)
    monkeypatch.setenv("PATH", "")
    result = run("build", "minicpm3", "--arch", "sm_90", "--out", tmp_path / "new")
    assert (result.status, result.out) == (1, "")
    assert re.fullmatch(r"mlagen: no compiler for NVIDIA GPUs; run `pip install 'mlagen\[cuda\]'` .*\n", result.err)
    assert not (tmp_path / "new").exists()


# The command line


def said(result: Result, status: int = 0) -> list[str]:
    assert result.status == status, result
    return result.out.splitlines()


@pytest.mark.cuda
def test_build_says_what_it_does(tmp_path):
    result = run("build", "minicpm3", "--tp", "8", "--arch", "sm_90", "--out", tmp_path / "new")
    assert result.err.splitlines() == [f"built {number}/{len(KERNELS)} {name}" for number, name in enumerate(KERNELS, start=1)]
    header, *rows, last = said(result)
    assert header.split() == ["kernel", *" ".join(FIELDS).replace("_", " ").split()]
    assert [row.split()[0] for row in rows] == list(KERNELS)
    assert last == f"{len(KERNELS)} kernels in {tmp_path / 'new'}"


@pytest.mark.cuda
def test_inspect_shows_what_is_known(built, entries):
    header, *rows = said(run("inspect", built))
    assert header.split()[1] == "registers"
    expected = [[name, *(str(entries[name]["resources"][field]) for field in FIELDS)] for name in sorted(KERNELS)]
    assert [row.split() for row in rows] == expected
    assert "?" not in "".join(rows)
    assert json.loads("\n".join(said(run("inspect", built, "--json")))) == {"kernels": entries, "damaged": []}


@pytest.mark.cuda
@pytest.mark.compiler
def test_inspect_shows_each_platform_by_itself(built, tmp_path):
    made = make(tmp_path, minicpm3("gfx950"), minicpm3())
    amd = len(made) - len(KERNELS)
    text = said(run("inspect", tmp_path))
    headers = {number: line.split()[1] for number, line in enumerate(text) if line.split()[0] == "kernel"}
    assert headers == {0: "vgprs", 1 + amd: "registers", 2 + amd + len(KERNELS): "instructions"}
    assert text[1 + amd : 2 + amd + len(KERNELS)] == said(run("inspect", built))
    assert len(text) == 3 + 2 * amd + len(KERNELS)
    assert "?" not in "".join(text)


@pytest.mark.cuda
def test_inspect_tells_damage(built, tmp_path):
    for name, data in contents(built).items():
        (tmp_path / name).write_bytes(data[:-1] if name == f"{LAST}.cubin" else data)
    text = said(run("inspect", tmp_path), 1)
    assert text[-1] == f"{LAST}: binary {LAST}.cubin is not the file that was built: its sha256 differs"


@pytest.mark.cuda
def test_check_looks_at_every_source(built, tmp_path):
    command = ("build", "minicpm3", "--tp", "8", "--arch", "sm_90", "--check", "--out")
    assert said(run(*command, built)) == [f"{built}: every source is what would be generated now"]
    for name, data in contents(built).items():
        if name != f"{LAST}.hip":
            (tmp_path / name).write_bytes(data)
    assert said(run(*command, tmp_path), 1) == [f"{tmp_path / LAST}.hip: No such file or directory"]
