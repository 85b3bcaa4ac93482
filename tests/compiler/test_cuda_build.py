"""build for NVIDIA: both kernels of a request, their cubins, what they cost, and what the command line shows of that."""

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
from mlagen.codegen import generate, variants
from mlagen.errors import BuildError, ToolchainError
from mlagen.models import PRESETS
from mlagen.shipped import Request, request
from mlagen.target import find_target

SM_90 = find_target("sm_90")
NAME = "mla_prologue_p64_wbf16_l256_r32_neox_bf16_qfp8_kvfp8_fused_sm_90"
BOTH = [NAME, f"{NAME}_unaligned"]
FIELDS = ["registers", "shared_bytes", "local_bytes", "spill_store_bytes", "spill_load_bytes", "waves_per_simd"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for variable in ("MLAGEN_TOOLCHAIN", "MLAGEN_CUDA_TOOLCHAIN", "ROCM_PATH"):
        monkeypatch.delenv(variable, raising=False)


def minicpm3(arch: str = "sm_90", tp: int = 8) -> Request:
    return request("minicpm3", tp, find_target(arch))


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


@pytest.mark.cuda
def test_both_kernels_are_there(built, entries):
    files = contents(built)
    del files["manifest.json"]
    described = {entry[kind]["file"]: entry[kind]["sha256"] for entry in entries.values() for kind in ("source", "binary")}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == described
    assert sorted(files) == sorted(f"{name}.{suffix}" for name in BOTH for suffix in ("cubin", "hip"))
    for aligned, name in zip((True, False), BOTH, strict=True):
        assert files[f"{name}.hip"].decode() == generate(minicpm3().spec, SM_90, aligned=aligned).source


@pytest.mark.cuda
@pytest.mark.parametrize("name", BOTH, ids=["aligned", "unaligned"])
def test_an_entry_describes_its_kernel(name, built, entries):
    entry = entries[name]
    assert entry["arch"] == "sm_90"
    assert entry["spec"] == dataclasses.asdict(minicpm3().spec)
    assert entry["serves"] == [{"model": "minicpm3", "tp": 8, "heads": 5}]
    assert entry["binary"]["compiler"] == cuda_toolchain.fingerprint()[0]
    assert sorted(entry["resources"]) == sorted(FIELDS)
    assert 24 <= entry["resources"]["registers"] <= 128
    assert entry["resources"]["waves_per_simd"] == SM_90.waves_per_simd(entry["resources"]["registers"])
    assert [entry["resources"][field] for field in FIELDS[1:-1]] == [0, 0, 0, 0]
    assert entry["instructions"] == {}
    assert name.encode() in (built / entry["binary"]["file"]).read_bytes()


@pytest.mark.cuda
@pytest.mark.parametrize("toolchain", ["nvrtc", "nvcc"])
@pytest.mark.parametrize("by", ["option", "variable"])
def test_the_toolchain_that_is_named_compiles(toolchain, by, tmp_path, monkeypatch):
    try:
        identity, _ = cuda_toolchain.fingerprint(toolchain)
    except ToolchainError:
        pytest.skip(toolchain)
    options = {"toolchain": toolchain} if by == "option" else {}
    monkeypatch.setenv("MLAGEN_CUDA_TOOLCHAIN", {"nvrtc": "nvcc", "nvcc": "nvrtc"}[toolchain] if options else toolchain)
    made = make(tmp_path, minicpm3(), **options)
    assert [entry["binary"]["compiler"] for entry in made.values()] == [identity, identity]


@pytest.mark.cuda
@pytest.mark.compiler
def test_both_platforms_share_a_folder(tmp_path, built):
    made = make(tmp_path, minicpm3("gfx950"), minicpm3(), minicpm3("gfx942"))
    assert Counter(entry["arch"] for entry in made.values()) == {"gfx942": 1, "gfx950": 1, "sm_90": 2}
    assert Counter(path.suffix for path in tmp_path.iterdir()) == {".hip": 4, ".co": 2, ".cubin": 2, ".json": 1}
    assert contents(tmp_path).items() >= {name: data for name, data in contents(built).items() if name != "manifest.json"}.items()


@pytest.mark.cuda
def test_kernels_that_coincide_are_built_once(tmp_path):
    made = make(tmp_path, minicpm3(tp=8), minicpm3(tp=4))
    assert sorted(made) == BOTH
    for entry in made.values():
        assert [each["tp"] for each in entry["serves"]] == [8, 4]


@pytest.mark.cuda
def test_the_number_of_cores_changes_nothing(built, tmp_path, monkeypatch):
    """Compilers that run in this process at once do not disturb one another."""
    for cores in (1, 8):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        others = [request("deepseek-r1", 8, SM_90, q_dtype=q, kv_dtype=kv) for q in ("fp8", "bf16") for kv in ("fp8", "bf16")]
        make(tmp_path / str(cores), minicpm3(), *others)
    assert contents(tmp_path / "1") == contents(tmp_path / "8")
    assert len(contents(tmp_path / "8")) == 21
    for name in BOTH:
        assert contents(tmp_path / "8")[f"{name}.cubin"] == contents(built)[f"{name}.cubin"]


@pytest.mark.cuda
def test_every_preset_builds(tmp_path):
    """None spills, on Hopper either, and the compiler has nothing to say of any."""
    requests = [
        request(name, 1, SM_90, q_dtype=dtype, kv_dtype=dtype) for name, shape in PRESETS.items() for dtype in ("fp8", shape.dtype)
    ]
    made = make(tmp_path, *requests)
    assert made.keys() == {kernel.name for each in requests for kernel in variants(each.spec, SM_90)}
    assert max(entry["resources"]["registers"] for entry in made.values()) <= 128  # for four waves on a SIMD
    assert {entry["resources"]["shared_bytes"] for entry in made.values()} == {0}


@pytest.mark.cuda
def test_the_compiler_has_nothing_to_say():
    kernels = [kernel for rounding in ("fused", "stepwise") for kernel in variants(_stepwise(rounding).spec, SM_90)]
    said = {each.name: cuda_toolchain.compile_device(each.source, "sm_90", name=each.name).warnings for each in kernels}
    assert said == dict.fromkeys(said, "")
    assert len(said) == 4


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
@pytest.mark.parametrize("spilling", BOTH, ids=["aligned", "unaligned"])
def test_local_memory_in_either_kernel_fails_the_build(spilling, tmp_path, monkeypatch):
    def spill(spec, target):
        return [
            dataclasses.replace(kernel, source=SPILLING.replace("NAME", kernel.name)) if kernel.name == spilling else kernel
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
    assert result.err == f"built 1/2 {BOTH[0]}\nbuilt 2/2 {BOTH[1]}\n"
    header, *rows, last = said(result)
    assert header.split() == ["kernel", *" ".join(FIELDS).replace("_", " ").split()]
    assert [row.split()[0] for row in rows] == BOTH
    assert last == f"2 kernels in {tmp_path / 'new'}"


@pytest.mark.cuda
def test_inspect_shows_what_is_known(built, entries):
    header, *rows = said(run("inspect", built))
    assert header.split()[1] == "registers"
    assert [row.split() for row in rows] == [[name, *(str(entries[name]["resources"][field]) for field in FIELDS)] for name in BOTH]
    assert "?" not in "".join(rows)
    assert json.loads("\n".join(said(run("inspect", built, "--json")))) == {"kernels": entries, "damaged": []}


@pytest.mark.cuda
@pytest.mark.compiler
def test_inspect_shows_each_platform_by_itself(built, tmp_path):
    make(tmp_path, minicpm3("gfx950"), minicpm3())
    text = said(run("inspect", tmp_path))
    assert [line.split()[1] for line in text] == [
        "vgprs", text[1].split()[1], "registers", text[3].split()[1], text[4].split()[1], "instructions", text[6].split()[1],
    ]  # fmt: skip
    assert text[2:5] == said(run("inspect", built))
    assert "?" not in "".join(text)


@pytest.mark.cuda
def test_inspect_tells_damage(built, tmp_path):
    for name, data in contents(built).items():
        (tmp_path / name).write_bytes(data[:-1] if name == f"{BOTH[1]}.cubin" else data)
    text = said(run("inspect", tmp_path), 1)
    assert text[-1] == f"{BOTH[1]}: binary {BOTH[1]}.cubin is not the file that was built: its sha256 differs"


@pytest.mark.cuda
def test_check_looks_at_both_sources(built, tmp_path):
    command = ("build", "minicpm3", "--arch", "sm_90", "--check", "--out")
    assert said(run(*command, built)) == [f"{built}: every source is what would be generated now"]
    for name, data in contents(built).items():
        if name != f"{BOTH[1]}.hip":
            (tmp_path / name).write_bytes(data)
    assert said(run(*command, tmp_path), 1) == [f"{tmp_path / BOTH[1]}.hip: No such file or directory"]
