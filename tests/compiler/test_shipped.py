"""Every kernel that the project ships, built: how many there are, and what their machine code may cost."""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mlagen import build as builder
from mlagen.codegen import generate
from mlagen.models import PRESETS
from mlagen.schedule import AbsorbTiles
from mlagen.shipped import ARCHS, representative, shipped_matrix

pytestmark = pytest.mark.compiler

KERNELS = 70  # five shapes of model and two archs, each with two types of query and of cache, and three weights in codes
MOST_OF_A_MODEL = 8  # on one arch: what a download and a build of a model take may not grow with each combination of options
MAX_VGPRS = 128  # for four waves on a SIMD

Entries = Mapping[str, dict[str, Any]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The whole matrix, built once for all of pytest's processes; warnings.json has what the compiler said."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    out = root / "shipped"
    with open(root / "shipped.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "warnings.json").exists():
            with pytest.MonkeyPatch.context() as patch:
                warnings = _collect_warnings(patch)
                builder.build(shipped_matrix(), out, progress=lambda name, done, total: None)
            (out / "warnings.json").write_text(json.dumps(warnings))
    return out


def _collect_warnings(patch: pytest.MonkeyPatch) -> dict[str, str]:
    warnings = {}
    compile_device = builder.compile_device

    def collect(source, arch, *, name, toolchain):
        compiled = compile_device(source, arch, name=name, toolchain=toolchain)
        warnings[name] = compiled.warnings
        return compiled

    patch.setattr(builder, "compile_device", collect)
    return warnings


@pytest.fixture
def entries(folder) -> Entries:
    return json.loads((folder / "manifest.json").read_text())["kernels"]


@pytest.fixture(scope="module")
def tiles() -> Mapping[str, AbsorbTiles]:
    """The tiles of each kernel's product."""
    kernels = (generate(each.spec, each.target) for each in shipped_matrix())
    return {kernel.name: kernel.schedule.absorb for kernel in kernels}


def unlike(entries: Entries, kind: str, expected: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """By kernel, what of `kind` differs from `expected`."""
    differences = {
        name: {key: entry[kind][key] for key in expected if entry[kind][key] != expected[key]} for name, entry in entries.items()
    }
    return {name: fields for name, fields in differences.items() if fields}


def test_the_matrix_is_whole():
    wanted = Counter(
        (arch, name, tp) for arch in ARCHS for name, shape in PRESETS.items() for tp in (1, 2, 4, 8) if shape.heads % tp == 0
    )
    found = Counter((each.target.arch, each.model, each.tp) for each in shipped_matrix())
    assert found == dict.fromkeys(wanted, 7)  # fp8 and bf16, for the query and for the cache; three weights in codes


def test_the_number_of_kernels(entries):
    assert len(entries) == KERNELS
    assert Counter(entry["arch"] for entry in entries.values()) == dict.fromkeys(ARCHS, KERNELS // 2)


def test_a_model_has_few_kernels():
    """Tensor-parallel sizes share theirs, since heads are no part of a kernel."""
    kernels: dict[tuple[str, str], set[str]] = {}
    for each in shipped_matrix():
        kernels.setdefault((each.model, each.target.arch), set()).add(generate(each.spec, each.target).name)
    assert {key: len(names) for key, names in kernels.items() if len(names) > MOST_OF_A_MODEL} == {}


def test_each_deployment_has_its_kernel(entries):
    for each in shipped_matrix():
        name = generate(each.spec, each.target).name
        assert {"model": each.model, "tp": each.tp, "heads": each.spec.heads} in entries[name]["serves"]
    assert sum(len(entry["serves"]) for entry in entries.values()) == len(shipped_matrix())


def test_the_files_are_there(entries, folder):
    found = {path.name for path in folder.iterdir()} - {"manifest.json", "warnings.json"}
    assert found == {f"{name}.{suffix}" for name in entries for suffix in ("hip", "co")}


def test_the_compiler_has_nothing_to_say(folder):
    warnings = json.loads((folder / "warnings.json").read_text())
    assert len(warnings) == KERNELS
    assert {name: text for name, text in warnings.items() if text} == {}


def test_nothing_spills(entries):
    assert unlike(entries, "resources", {"scratch_bytes": 0, "vgpr_spills": 0, "sgpr_spills": 0}) == {}


def test_no_shared_memory_and_no_barriers(entries):
    assert unlike(entries, "resources", {"lds_bytes": 0}) == {}
    assert unlike(entries, "instructions", {"lds": 0, "barriers": 0}) == {}


def test_memory_is_global_and_calls_are_inlined(entries):
    assert unlike(entries, "instructions", {"flat": 0, "scratch": 0, "calls": 0}) == {}


def test_four_waves_fit_on_a_simd(entries):
    assert {name: entry["resources"]["vgprs"] for name, entry in entries.items() if entry["resources"]["vgprs"] > MAX_VGPRS} == {}
    assert {name for name, entry in entries.items() if entry["resources"]["waves_per_simd"] < 4} == set()


def test_weights_come_in_wide_loads(entries, tiles):
    """A lane loads each fragment of the weights, or as many codes, by one instruction of 128 bits, each chunk of q by another."""
    loads = {name: entry["instructions"]["global_loads"] for name, entry in entries.items()}
    bits = {name: 4 if "_wmxfp4_" in name else 8 if "_wfp8" in name else 16 for name in entries}
    wanted = {name: tiles[name].chunks + -(-tiles[name].chunks * tiles[name].m_tiles * bits[name] // 16) for name in entries}
    narrow = {name: counts for name, counts in loads.items() if counts["128"] < wanted[name]}
    assert narrow == {}
    assert set().union(*loads.values()) <= {"16", "32", "64", "128"}


def test_outputs_leave_in_wide_stores(entries):
    assert {name for name, entry in entries.items() if "128" not in entry["instructions"]["global_stores"]} == set()


def test_the_product_is_matrix_instructions(entries, tiles):
    """As many as the tiles say, of the arch's own shape."""
    mnemonics = {"gfx942": "v_mfma_f32_16x16x16_bf16", "gfx950": "v_mfma_f32_16x16x32_bf16"}
    for name, entry in entries.items():
        count = tiles[name].chunks * tiles[name].atoms_per_chunk * tiles[name].m_tiles
        assert entry["instructions"]["mfma"] == {mnemonics[entry["arch"]]: count}, name


def test_leading_arguments_are_preloaded(entries):
    assert unlike(entries, "resources", {"kernarg_preload_sgprs": 14}) == {}


def test_what_is_checked_in_is_mostly_shipped(entries):
    """The few besides show what is not in the matrix: stepwise rounding, a lower limit, an absorbed query."""
    checked_in = [generate(each.spec, each.target) for each in representative()]
    beside = [kernel.name for kernel in checked_in if kernel.name not in entries]
    assert len({kernel.name for kernel in checked_in}) == len(checked_in) == 11
    assert len(beside) == 2
    assert any("_stepwise_max224_" in name for name in beside)
    assert any("_absorbed_" in name for name in beside)
