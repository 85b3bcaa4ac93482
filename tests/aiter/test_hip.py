"""AITER's HIP operator fused_qk_rope_concat_and_cache_mla and mlagen's, called alike on one AMD GPU: the same bits.

What is left out is what the drop-in's docstring calls a defect of AITER's, or what only one of the two takes.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aiter_calls import Call, unwritten
from golden_vectors import same_bits
from helpers import Row, covering

from mlagen.integrations.aiter import fused_qk_rope_concat_and_cache_mla
from mlagen.peers.aiter_hip import OPERATOR
from mlagen.runtime import device_arch
from mlagen.target import TARGETS
from mlagen.torch_types import torch_dtype

MAX_POSITION = 512

FACTORS = {
    "dtype": [torch.bfloat16, torch.float16],
    "outputs": [("model", "model"), ("model", "fp8"), ("fp8", "fp8")],  # of the query and of the cache
    "neox": [False, True],
    "nope_first": [True, False],
    "tokens": [1, 5, 64, 300],
    "heads": [1, 3, 16, 128],
    "latent": [512, 128],
    "rotary": [64, 32],
    "block_size": [1, 16, 64],
    "padded": [False, True],
    "all_rows": [False, True],
    "head_axis": [False, True],
    "query": ["dense", "head major"],
}


def takes(row: Row) -> bool:
    """Whether AITER takes it: all rows only by its kernels for one slot a block, or for many heads."""
    usual = row["rotary"] == 64 and row["latent"] == 512
    per_head = row["rotary"] == 64 and row["nope_first"] and row["block_size"] == 1 and row["tokens"] < 256
    return not row["all_rows"] or per_head or (usual and row["heads"] >= 4)


ROWS = covering(FACTORS, takes)


def make_call(row: Row, fp8: torch.dtype, device: str, seed: int) -> Call:
    """Arguments by AITER's names.  Columns that are copied have values beyond fp8, where both saturate; rotary ones none."""
    generator = torch.Generator().manual_seed(seed)
    dtype, tokens, heads, latent, rotary = (row[name] for name in ("dtype", "tokens", "heads", "latent", "rotary"))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q_nope = draw(heads, tokens, latent).transpose(0, 1) if row["query"] == "head major" else draw(tokens, heads, latent)
    kv_c, k_pe = draw(tokens, latent), draw(tokens, rotary)
    q_nope[..., 3::61] *= 64
    kv_c[..., 3::61] *= 64
    blocks = tokens // row["block_size"] + 2
    slots = torch.randperm(blocks * row["block_size"], generator=generator)[:tokens]
    if row["padded"]:
        slots[(tokens + 1) // 2 :] = -1
    angles = torch.arange(MAX_POSITION)[:, None] / 10000 ** (torch.arange(0, rotary, 2) / rotary)
    q, kv = ({"fp8": fp8, "model": dtype}[name] for name in row["outputs"])
    axis = (1,) if row["head_axis"] else ()
    call = {
        "q_nope": q_nope.to(dtype),
        "q_pe": draw(tokens, heads, rotary).to(dtype),
        "kv_c": kv_c.to(dtype).reshape(tokens, *axis, latent),
        "k_pe": k_pe.to(dtype).reshape(tokens, *axis, rotary),
        "kv_cache": unwritten(torch.zeros(blocks, row["block_size"], *axis, latent + rotary, dtype=kv)),
        "q_out": unwritten(torch.zeros(tokens, heads, latent + rotary, dtype=q)),
        "slot_mapping": slots,
        "k_scale": torch.tensor([0.037]),
        "q_scale": torch.tensor([0.021]),
        "positions": torch.randint(0, MAX_POSITION, (tokens,), generator=generator),
        "cos_cache": angles.cos().to(dtype),
        "sin_cache": angles.sin().to(dtype),
    }
    flags = {"is_neox": row["neox"], "is_nope_first": row["nope_first"], "compute_all_q_rope": row["all_rows"]}
    return {name: each.to(device) for name, each in call.items()} | flags


def different(theirs: Callable[..., Any], row: Row, fp8: torch.dtype, device: str, seed: int) -> dict[str, int]:
    """For each output how many elements differ between `theirs` and mlagen's, where any does."""
    calls = [make_call(row, fp8, device, seed) for _ in range(2)]
    for operator, call in zip((theirs, fused_qk_rope_concat_and_cache_mla), calls, strict=True):
        operator(**call)
    written = (calls[0]["slot_mapping"] >= 0) | row["all_rows"]  # the other rows AITER leaves as they were
    found = {}
    for name, rows in (("q_out", written), ("kv_cache", ...)):
        one, other = (each[name].view(torch.uint8)[rows].view(each[name].dtype) for each in calls)
        found[name] = int((~same_bits(one, other)).sum())
    return {name: count for name, count in found.items() if count}


@pytest.mark.aiter
@pytest.mark.parametrize("seed", range(len(ROWS)), ids=lambda seed: "-".join(map(str, ROWS[seed].values())))
def test_the_same_bits(seed):
    theirs, fp8 = getattr(importlib.import_module("aiter"), OPERATOR), torch_dtype(TARGETS[device_arch(0)].fp8)
    assert not different(theirs, ROWS[seed], fp8, "cuda", seed)


# That it would see a difference, on any machine

SMALL = [row for row in ROWS if row["tokens"] * row["heads"] <= 64]


def next_slots(call: Call) -> torch.Tensor:
    slots, (blocks, block_size, *_) = call["slot_mapping"], call["kv_cache"].shape
    return torch.where(slots < 0, slots, (slots + 1) % (blocks * block_size))


CHANGES = {
    "style": lambda call: {"is_neox": not call["is_neox"]},
    "order": lambda call: {"is_nope_first": not call["is_nope_first"]},
    "scale": lambda call: {"q_scale": call["q_scale"] * 2, "k_scale": call["k_scale"] * 2},
    "slots": lambda call: {"slot_mapping": next_slots(call)},
}


@pytest.mark.host
@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_seen(change):
    def theirs(**call: Any) -> None:
        fused_qk_rope_concat_and_cache_mla(**{**call, **CHANGES[change](call)})

    rows = [row for row in SMALL if change != "scale" or "fp8" in row["outputs"]]
    found = [different(theirs, row, torch.float8_e4m3fn, "cpu", seed) for seed, row in enumerate(rows[:4])]
    assert all(found)


@pytest.mark.host
def test_the_calls_are_ones_that_mlagen_takes():
    for seed, row in enumerate(SMALL[:4]):
        assert not different(fused_qk_rope_concat_and_cache_mla, row, torch.float8_e4m3fn, "cpu", seed)


def test_each_of_aiters_kernels_is_there():
    """Those for decoding: for a slot a block, for many heads, and the general one."""
    per_head = [row for row in ROWS if row["nope_first"] and row["block_size"] == 1 and row["rotary"] == 64 and row["tokens"] < 256]
    many = [row for row in ROWS if row not in per_head and row["rotary"] == 64 and row["latent"] == 512 and row["heads"] >= 4]
    assert min(len(per_head), len(many), len(ROWS) - len(per_head) - len(many)) >= 3
