"""Kernels of the cache layouts build for every target: no spills, no scratch, and for NVIDIA aligned rows and others."""

import json
from pathlib import Path

import pytest

from mlagen.build import build
from mlagen.shipped import request
from mlagen.target import find_target

CACHES = {"segmented": {"kv_layout": "segmented"}, "fp8_ds_mla": {"kv_layout": "fp8_ds_mla"}, "kvheads": {"kv_heads": 4}}
"""What is asked for, by what the names of the kernels say of it."""


def resources(out: Path, arch: str, layout: str) -> list[dict[str, int]]:
    """Of every kernel of DeepSeek-R1 at TP 8 with a cache of this layout."""
    wanted = request("deepseek-r1", 8, find_target(arch), **CACHES[layout])
    build([wanted], out, progress=lambda name, done, total: None)
    kernels = json.loads((out / "manifest.json").read_text())["kernels"]
    assert all(layout in name for name in kernels)
    return [entry["resources"] for entry in kernels.values()]


@pytest.mark.compiler
@pytest.mark.parametrize("layout", CACHES)
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_amd(tmp_path, arch, layout):
    (found,) = resources(tmp_path, arch, layout)
    assert found["vgpr_spills"] == found["sgpr_spills"] == found["scratch_bytes"] == 0


@pytest.mark.cuda
@pytest.mark.parametrize("layout", CACHES)
def test_nvidia(tmp_path, layout):
    found = resources(tmp_path, "sm_90", layout)
    assert len(found) > 1
    assert all(each["spill_store_bytes"] == each["spill_load_bytes"] == each["local_bytes"] == 0 for each in found)
