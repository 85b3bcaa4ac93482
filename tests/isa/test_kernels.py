"""The machine code of whole kernels against the host run, byte for byte, and against the oracle."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import Workload
from isa.machine import ARCHS, build, check

from mlagen.spec import PrologueSpec

pytestmark = [pytest.mark.isa, pytest.mark.compiler, pytest.mark.host]

BASE = {"heads": 3, "nope_dim": 128, "lora_rank": 512, "rope_dim": 64, "rope_style": "gptj"}


@dataclass(frozen=True)
class Scenario:
    """What is run: `spec` overrides fields of BASE, `build` the schedule's."""

    name: str
    spec: dict[str, Any]
    workload: Workload
    build: dict[str, int] = field(default_factory=dict)
    preload: bool = True


def work(tokens: int, **options: Any) -> Workload:
    """Densely packed inputs, unless told otherwise."""
    return Workload(tokens, **{"layout": "dense", "cache": "dense", **options})


FP16, BF16_OUTPUTS = {"dtype": "fp16"}, {"q_dtype": "bf16", "kv_dtype": "bf16"}
ODD = {"layout": "sliced", "cache": "padded"}
INT32 = {"slots_dtype": torch.int32, "positions_dtype": torch.int32}

SCENARIOS = (
    Scenario("deepseek", {"heads": 16}, work(17)),
    Scenario("without preloaded arguments", {}, work(5), preload=False),
    Scenario("one token and head", {"heads": 1}, work(1)),
    Scenario("stepwise", {"rounding": "stepwise"}, work(17, layout="transposed")),
    Scenario("neox, bf16 q, stepwise", {"rope_style": "neox", "q_dtype": "bf16", "rounding": "stepwise"}, work(5)),
    Scenario("no rotation, bf16 cache", {"rope_style": "none", "kv_dtype": "bf16"}, work(17, cache="interleaved")),
    Scenario("bf16 outputs", BF16_OUTPUTS, work(5, positions="stale")),
    Scenario("fp16, P=192", {**FP16, "nope_dim": 192, "rope_style": "neox"}, work(17)),
    Scenario("fp16 outputs, stepwise", {**FP16, "q_dtype": "fp16", "kv_dtype": "fp16", "rounding": "stepwise"}, work(5)),
    Scenario("R=0", {"heads": 1, "rope_dim": 0, "rope_style": "none"}, work(17)),
    Scenario("R=10", {"rope_dim": 10, "rope_style": "neox"}, work(5, **ODD)),
    Scenario("absorbed", {"heads": 16, "weight": "none"}, work(17, layout="joined")),
    Scenario("absorbed, R=0", {"weight": "none", "rope_dim": 0, "rope_style": "none", **BF16_OUTPUTS}, work(5)),
    Scenario("padded chunk, int32", {"nope_dim": 48, "lora_rank": 256}, work(17, table_dtype="fp32", **INT32)),
    Scenario("no slots, stale positions", {}, work(17, slots="none", positions="stale", **INT32)),
    Scenario("no scales, fp8_max", {"fp8_max": 224.0}, work(5, scales="none", table="pair")),
    Scenario("odd strides", {"rounding": "stepwise"}, work(5, **ODD, table_dtype="fp32")),
    Scenario("odd strides, bf16 outputs", {**BF16_OUTPUTS, "rope_style": "neox"}, work(5, **ODD)),
    Scenario("NaN", {}, work(9, special=True)),
    Scenario("NaN, neox, stepwise", {"rope_style": "neox", "rounding": "stepwise"}, work(17, special=True)),
    Scenario("KV heads", {"kv_heads": 3, "heads": 2}, work(5)),
    Scenario("KV heads, odd strides, bf16", {**BF16_OUTPUTS, "kv_heads": 2, "rope_dim": 10}, work(5, **ODD)),
    Scenario("segmented", {"kv_layout": "segmented"}, work(5, block_size=3)),
    Scenario("segmented, odd strides, bf16", {**BF16_OUTPUTS, "kv_layout": "segmented", "rope_dim": 10}, work(5, **ODD)),
    Scenario("fp8_ds_mla", {"kv_layout": "fp8_ds_mla"}, work(9)),
    Scenario("fp8_ds_mla, odd strides", {"kv_layout": "fp8_ds_mla", "lora_rank": 128, "rope_dim": 10}, work(5, **ODD)),
    Scenario("scales for rows", {"q_scaling": "token"}, work(17)),
    Scenario(
        "scales for rows, NaN, neox, stepwise",
        {"q_scaling": "token", "rope_style": "neox", "rounding": "stepwise"},
        work(9, special=True),
    ),
    Scenario("scales for absorbed rows", {"q_scaling": "token", "weight": "none"}, work(5)),
    Scenario("a split query", {"q_split": True}, work(17, **ODD)),
    Scenario("a split bf16 query", {"q_split": True, "q_dtype": "bf16", "rope_style": "neox", "write_kv": False}, work(5)),
    Scenario("the cache alone", {"write_q": False}, work(17, **ODD)),
    Scenario("the query alone", {"write_kv": False, "rope_style": "neox"}, work(5)),
    Scenario("fp8 weights", {"weight": "fp8", "heads": 2}, work(5)),
    Scenario("fp8 weights, fp16, padded chunk", {**FP16, "weight": "fp8", "nope_dim": 48, "lora_rank": 256}, work(5, **ODD)),
    Scenario("fp8-block weights", {"weight": "fp8-block", "nope_dim": 192, "lora_rank": 320}, work(17)),
    Scenario("mxfp4 weights", {"weight": "mxfp4", "heads": 2}, work(5)),
    Scenario("mxfp4 weights, bf16 outputs", {**BF16_OUTPUTS, "weight": "mxfp4", "nope_dim": 192, "lora_rank": 320}, work(17)),
    Scenario("a8", {"weight": "fp8", "compute": "a8", "heads": 2}, work(5)),
    Scenario("a8, padded chunk, NaN", {"weight": "fp8", "compute": "a8", "nope_dim": 208, "lora_rank": 256}, work(9, special=True)),
    Scenario("two waves for a workgroup", {"heads": 5}, work(17), build={"waves_per_workgroup": 2}),
    Scenario("all tokens in one workgroup", {}, work(40), build={"compute_units": 1}),
)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_machine_code_gives_the_bytes_of_the_host_run(scenario: Scenario, arch: str) -> None:
    pair = build(PrologueSpec(**{**BASE, **scenario.spec}), arch, **scenario.build)
    check(pair, scenario.workload, preload=scenario.preload)
    if "compute_units" in scenario.build:
        assert pair.plan(scenario.workload.tokens).token_tiles_per_workgroup > 1
