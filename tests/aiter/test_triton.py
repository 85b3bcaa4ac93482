"""AITER's Triton operators from a checkout, interpreted on the CPU and compiled for a GPU, beside a model of them and mlagen."""

import functools
from typing import Any

import pytest
import torch
from aiter_triton_model import (
    FP8_BMM,
    MAX_POSITION,
    NO_ABSORB,
    SLOTS,
    Call,
    Machine,
    Results,
    aiter_results,
    differences,
    gpu,
    interpreter,
    make_call,
    model,
    stored,
)
from helpers import covering

from mlagen.integrations.aiter import fused_fp8_bmm_rope_cat_and_cache_mla, fused_qk_rope_concat_and_cache_mla
from mlagen.runtime import device_arch
from mlagen.target import TARGETS
from mlagen.torch_types import torch_dtype

pytestmark = [pytest.mark.aiter_root, pytest.mark.triton]

DTYPES = {"cpu": [torch.float32, torch.float16], "cuda": [torch.bfloat16, torch.float16]}
"""float32 holds bf16 values, with which the interpreter cannot compute."""

COMMON = {
    "tokens": [1, 5],
    "heads": [(3, 1), (4, 2)],
    "latent": [64, 256],
    "rotary": [16, 64],
    "prefill": [0, 2],
    "neox": [True, False],
    "cache": ["fp8", "bf16"],
    "query": ["model", "fp8"],
    "slots": [torch.int64, torch.int32],
    "table": ["half", "full", "4 dimensions", "fp32"],
    "scale": [True, False],
    "zeros": [0, 1],
}
COPIED = {**COMMON, "upcast": [True, False]}
MULTIPLIED = {**COMMON, "tokens": [1, 5, 20], "nope": [64, 128, 192], "group": [128, 64], "tile_group": [1, 2], "zeros": [0, 1, 2]}

Row = dict[str, Any]


def has_slots(row: Row) -> bool:
    return row["tokens"] + row["prefill"] <= SLOTS


def mlagen_has(row: Row) -> bool:
    """Its cache is fp8, or the model's and has no scale then."""
    return row["cache"] == "fp8" or (not row["scale"] and row["dtype"] is not torch.float16)


def mlagen_has_with_absorb(row: Row) -> bool:
    """It quantises 128 columns with one scale, or all where these are fewer."""
    return has_slots(row) and mlagen_has(row) and (row["group"] == 128 or row["nope"] <= row["group"])


SWEEPS = {
    "no absorb": (NO_ABSORB, COPIED, has_slots),
    "fp8 bmm": (FP8_BMM, MULTIPLIED, has_slots),
    "beside mlagen": (NO_ABSORB, {**COPIED, "heads": [(3, 1), (16, 1)], "prefill": [0]}, mlagen_has),
    "fp8 bmm beside mlagen": (FP8_BMM, MULTIPLIED, mlagen_has_with_absorb),
}
"""Of each: the operator, what varies, and what may occur."""

MACHINES = [
    pytest.param("interpreter", marks=[pytest.mark.interpreter, pytest.mark.slow]),
    pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.slow]),
]


def find_machine(name: str) -> Machine:
    return gpu(device_arch(0)) if name == "gpu" else interpreter()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(call, AITER's results) for every row of a sweep on a machine, which runs once."""

    @functools.cache
    def run(name: str, sweep: str) -> list[tuple[Call, Results]]:
        machine, (operator, factors, allowed) = find_machine(name), SWEEPS[sweep]
        fp8 = torch_dtype(TARGETS[machine.told].fp8)
        rows = covering({**factors, "dtype": DTYPES[machine.device]}, allowed)
        calls = [make_call(row, fp8, seed) for seed, row in enumerate(rows)]
        return list(zip(calls, aiter_results(machine, operator, calls, tmp_path_factory.mktemp("aiter")), strict=True))

    return run


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_model_explains_aiter(machine, sweep, results):
    """What mlagen is compared with is what AITER does."""
    for call, given in results(machine, sweep):
        assert not differences(call, given, model(call, find_machine(machine))), describe(call)


@pytest.mark.host
@pytest.mark.parametrize("machine", MACHINES)
def test_mlagen_beside_the_operator_without_absorb(machine, results):
    """mlagen's results lie where AITER's may, and are the same where neither rotates nor divides: a GPU's division is not exact."""
    for call, given in results(machine, "beside mlagen"):
        ours = run_mlagen(call, find_machine(machine).device)
        assert not differences(call, {**given, **ours}, model(call, find_machine(machine))), describe(call)
        latent = call["q_nope"].shape[-1]
        for name in ("q_out", "kv_cache") if machine == "interpreter" else ("q_out",):
            assert torch.equal(*(each[name][..., :latent].double() for each in (ours, given))), (name, describe(call))


def run_mlagen(call: Call, device: str) -> Results:
    """q_out and kv_cache by the drop-in for AITER's HIP operator, which rotates in fp32."""
    tokens, heads, latent = call["q_nope"].shape
    kept = torch.bfloat16 if call["q_nope"].dtype is torch.float32 else call["q_nope"].dtype
    columns = call["q_pe"].shape[-1] // 2
    step = 1 if call["cos"].shape[-1] == columns or call["is_neox"] else 2
    tables = (call[name].reshape(MAX_POSITION, -1)[:, : columns * step : step] for name in ("cos", "sin"))
    cos, sin = (table if (table.to(kept).float() != table.float()).any() else table.to(kept) for table in tables)
    arguments = {
        **{name: call[name].to(kept) for name in ("q_nope", "q_pe", "k_pe")},
        "kv_c": call["k_nope"].to(kept),
        "kv_cache": torch.zeros_like(call["kv_cache"]).unsqueeze(1),
        "q_out": torch.empty(tokens, heads, latent + 2 * columns, dtype=call["q_out_dtype"]),
        "slot_mapping": call["slot_mapping"],
        "k_scale": call["k_scale"] if call["apply_scale"] else torch.ones(()),
        "q_scale": torch.ones(()),
        "positions": call["pos"],
        "cos_cache": cos,
        "sin_cache": sin,
    }
    arguments = {name: each.to(device) for name, each in arguments.items()}
    fused_qk_rope_concat_and_cache_mla(**arguments, is_neox=call["is_neox"], is_nope_first=True)
    return {"q_out": arguments["q_out"].cpu(), "kv_cache": arguments["kv_cache"].squeeze(1).cpu()}


@pytest.mark.host
@pytest.mark.parametrize("machine", MACHINES)
def test_mlagen_beside_the_operator_with_absorb(machine, results):
    """mlagen's results lie where AITER's may; in the latent columns nearly all are the same, so that both quantise alike."""
    equal = total = 0
    for call, given in results(machine, "fp8 bmm beside mlagen"):
        ours, expected = run_absorb(call, find_machine(machine).device), model(call, find_machine(machine))
        expected |= {name: stored(expected[name], ours[name].dtype) for name in ("k_pe_out", "decode_q_pe_out")}
        assert not differences(call, ours, expected), describe(call)
        one, other = (each["q_out"][..., : call["w_k"].shape[1]].double() for each in (ours, given))
        equal, total = equal + int((one == other).sum()), total + one.numel()
    assert equal >= 0.99 * total > 0


def run_absorb(call: Call, device: str) -> Results:
    """The four results and kv_cache by the drop-in, of AITER's own arguments but that float32 becomes the bf16 that it holds."""
    kept = torch.bfloat16 if call["q_nope"].dtype is torch.float32 else call["q_nope"].dtype
    arguments = {**call, **{name: call[name].to(kept) for name in ("q_nope", "q_pe", "k_nope", "k_rope")}}
    if all(torch.equal(call[name].to(kept).float(), call[name].float()) for name in ("cos", "sin")):
        arguments |= {name: call[name].to(kept) for name in ("cos", "sin")}
    arguments["kv_cache"] = torch.zeros_like(call["kv_cache"])
    given = {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in arguments.items()}
    returned = fused_fp8_bmm_rope_cat_and_cache_mla(**given)
    names = ("q_out", "decode_q_pe_out", "k_pe_out", "q_nope_zeros_out")
    return {name: each.cpu() for name, each in [*zip(names, returned, strict=True), ("kv_cache", given["kv_cache"])]}


def describe(call: Call) -> dict[str, Any]:
    """A call's shapes and dtypes, and its other arguments."""
    return {name: (list(v.shape), v.dtype) if isinstance(v, torch.Tensor) else v for name, v in call.items()}


# That it would see a defect

CHANGES = {
    "no absorb": {
        "style": lambda call: {"is_neox": not call["is_neox"]},
        "position": lambda call: {"pos": (call["pos"] + 1) % MAX_POSITION},
        "scale": lambda call: {"k_scale": call["k_scale"] * 1.01, "apply_scale": True},
    },
    "fp8 bmm": {
        "activations": lambda call: {"group_size": 32},
        "weight's scale": lambda call: {"w_k_scale": call["w_k_scale"] * 1.01},
        "weight's rows": lambda call: {"w_k": call["w_k"].view(torch.uint8).roll(1, 1).view(call["w_k"].dtype)},
        "style": lambda call: {"is_neox": not call["is_neox"]},
    },
}


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize(("sweep", "change"), [(sweep, change) for sweep in CHANGES for change in CHANGES[sweep]])
def test_a_model_of_something_else_does_not_explain_aiter(sweep, change, results):
    wrong = [
        call
        for call, given in results("interpreter", sweep)
        if differences(call, given, model({**call, **CHANGES[sweep][change](call)}, interpreter()))
    ]
    assert len(wrong) >= len(results("interpreter", sweep)) / 2


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_range_is_narrow(sweep, results):
    """An output is the rounding of the exact value almost everywhere, so that the range hides no systematic difference."""
    equal = total = 0
    for call, given in results("interpreter", sweep):
        if call["q_pe"].dtype is torch.float32:  # in fp16 each step of RoPE rounds
            expected = model(call, interpreter())["q_out"].exact
            equal, total = equal + int((given["q_out"].double() == expected).sum()), total + expected.numel()
    assert equal >= 0.99 * total > 0
