"""Kernels of weights in codes build for every target: no spills, no scratch, and for NVIDIA every layout of the table."""

import json
from pathlib import Path

import pytest

from mlagen.build import build
from mlagen.shipped import request
from mlagen.target import find_target

WEIGHTS = {
    "wfp8": {"weight": "fp8"},
    "wfp8block": {"weight": "fp8-block"},
    "wmxfp4": {"weight": "mxfp4"},
    "wfp8_a8": {"weight": "fp8", "compute": "a8"},
}
"""What is asked for, by what the names of the kernels say of it."""

# P of 128, 192 with few heads, and 256.
MODELS = (("deepseek-r1", 8), ("glm-4.7-lite", 1), ("glm5-next", 8))


def entries(out: Path, arch: str, model: str, tp: int, weight: str) -> list[dict[str, dict[str, int]]]:
    wanted = request(model, tp, find_target(arch), **WEIGHTS[weight])
    build([wanted], out, progress=lambda name, done, total: None)
    kernels = json.loads((out / "manifest.json").read_text())["kernels"]
    assert all(f"_{weight}_" in name for name in kernels)
    return list(kernels.values())


@pytest.mark.compiler
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("model", "tp"), MODELS)
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_amd(tmp_path, arch, model, tp, weight):
    (entry,) = entries(tmp_path, arch, model, tp, weight)
    resources, instructions = entry["resources"], entry["instructions"]
    assert resources["vgpr_spills"] == resources["sgpr_spills"] == resources["scratch_bytes"] == 0
    assert instructions["scratch"] == instructions["calls"] == 0
    (product,) = instructions["mfma"]
    assert ("fp8" in product) == (weight == "wfp8_a8")


@pytest.mark.cuda
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("model", "tp"), MODELS)
def test_nvidia(tmp_path, model, tp, weight):
    """Aligned rows and others."""
    found = [entry["resources"] for entry in entries(tmp_path, "sm_90", model, tp, weight)]
    assert len(found) > 1
    assert all(each["spill_store_bytes"] == each["spill_load_bytes"] == each["local_bytes"] == 0 for each in found)
