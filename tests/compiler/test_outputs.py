"""Kernels with other results than the usual two compile for every target, without a warning and without spilling a register."""

from typing import Any

import pytest

from mlagen.codegen import variants
from mlagen.compilers import compile_device, read_resources, refuse_spills
from mlagen.spec import PrologueSpec
from mlagen.target import find_target

SPECS: dict[str, dict[str, Any]] = {
    "scales for rows": {"q_scaling": "token"},
    "scales for absorbed rows": {"q_scaling": "token", "weight": "none", "rope_style": "neox"},
    "scales for rows, 192 columns": {"q_scaling": "token", "nope_dim": 192},
    "scales for rows in passes": {"q_scaling": "token", "nope_dim": 256, "lora_rank": 1024, "rounding": "stepwise"},
    "scales for rows, fp8 weights": {"q_scaling": "token", "weight": "fp8", "fp8_max": 224},
    "scales for rows, fp8 blocks": {"q_scaling": "token", "weight": "fp8-block", "nope_dim": 192},
    "scales for rows, mxfp4": {"q_scaling": "token", "weight": "mxfp4", "rope_style": "neox"},
    "scales for rows, a8": {"q_scaling": "token", "weight": "fp8", "compute": "a8", "kv_layout": "fp8_ds_mla"},
    "a split query": {"q_split": True},
    "a split bf16 query": {"q_split": True, "q_dtype": "bf16", "rope_style": "neox"},
    "the query alone": {"write_kv": False},
    "the query alone, no RoPE columns": {"write_kv": False, "rope_style": "none", "rope_dim": 0, "q_dtype": "bf16"},
    "the cache alone": {"write_q": False},
    "the cache alone, bf16": {"write_q": False, "kv_dtype": "bf16", "rope_style": "neox"},
}


@pytest.mark.parametrize(
    "arch",
    [
        *(pytest.param(arch, marks=pytest.mark.compiler) for arch in ("gfx942", "gfx950")),
        pytest.param("sm_90", marks=pytest.mark.cuda),
    ],
)
@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_it_compiles(changes, arch):
    options = {"heads": 16, "nope_dim": 128, "lora_rank": 512, "rope_dim": 64, "rope_style": "gptj"}
    for generated in variants(PrologueSpec(**{**options, **changes}), find_target(arch)):
        compiled = compile_device(generated.source, arch, name=generated.name, toolchain="auto")
        assert compiled.warnings == ""
        resources = read_resources(compiled, generated.name)
        assert resources is not None
        refuse_spills(resources, generated.name)
