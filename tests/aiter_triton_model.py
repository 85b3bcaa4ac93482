"""AITER's two Triton operators of this prologue: random calls, what AITER gives for them, and what their arithmetic may give.

The model follows the operators' definition, not their code: exact values in fp64, and around them the range that the roundings
explain.  Each rounding is that of a format: of fp32 (2^-24), of the model's dtype where AITER rotates in it, of an output.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlagen.reference import SMALLEST_NORMAL, UNIT_ROUNDOFF, Bounded

NO_ABSORB, FP8_BMM = "fused_qk_rope_cat_and_cache_mla", "fused_fp8_bmm_rope_cat_and_cache_mla"

PROGRAM = Path(__file__).parent / "aiter/triton_calls.py"
MAX_POSITION, SLOTS = 40, 24

# Of a rounding to nearest: the largest relative error, and the largest absolute one among subnormals.
ROUNDING = {torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 2.0**-134), torch.float32: (UNIT_ROUNDOFF, 2.0**-150)}

LEAST_ABSMAX = 1e-10
"""Below this AITER takes the largest magnitude of a group for this."""

Call = dict[str, Any]
"""Arguments by AITER's names."""

Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Machine:
    """Where AITER's kernels run, and how exact its fp32 is: relative errors of an addend of a matrix product, and of a division.

    `told` is the arch that AITER is told, which decides the flavour of fp8.
    """

    device: str
    told: str
    addend: float
    division: float


def interpreter() -> Machine:
    """Triton's interpreter, whose fp32 is IEEE's.  It has no e4m3fnuz."""
    return Machine("cpu", "gfx950", UNIT_ROUNDOFF, UNIT_ROUNDOFF)


def gpu(arch: str) -> Machine:
    """Matrix units cut addends off behind the largest one's 24 bits, not round; a fast division has an error of two last places."""
    return Machine("cuda", arch if arch.startswith("gfx") else "gfx950", 2.0**-22, 2.0**-22)


# Calls


def make_call(row: dict[str, Any], fp8: torch.dtype, seed: int) -> Call:
    """Arguments of the operator for a row of values: dimensions, dtypes and layouts by name.

    float32 tensors hold bf16 values: Triton's interpreter computes with bf16's bits as if they were integers.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype, (heads, kv_heads), tokens, latent, rotary = (row[name] for name in ("dtype", "heads", "tokens", "latent", "rotary"))
    kept = torch.bfloat16 if dtype is torch.float32 else dtype

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(kept).to(dtype)

    rows = tokens + row["prefill"]
    slots = torch.randperm(SLOTS, generator=generator)[:rows]
    slots[1:2] = -1
    slots[tokens + 1 :] = -1
    angles = torch.arange(MAX_POSITION)[:, None] / 3.0 ** torch.arange(rotary // 2)
    tables = [table if row["table"] == "fp32" else table.to(kept).to(dtype) for table in (angles.cos(), angles.sin())]
    if row["table"] == "full":
        tables = [torch.cat((t, t), -1) if row["neox"] else t.repeat_interleave(2, -1) for t in tables]
    elif row["table"] == "4 dimensions":
        tables = [table[:, None, None] for table in tables]
    formats = {"fp8": fp8, "model": kept, "bf16": torch.bfloat16}
    call = {
        "q_pe": draw(tokens, heads, rotary),
        "k_nope": draw(rows, kv_heads, latent),
        "kv_cache": torch.zeros(SLOTS, kv_heads, latent + rotary).to(formats[row["cache"]]),
        "slot_mapping": slots.to(row["slots"]),
        "cos": tables[0],
        "sin": tables[1],
        "k_scale": torch.tensor(0.037),
        "is_neox": row["neox"],
        "q_out_dtype": formats[row["query"]],
        "num_decode_toks_for_zeros": tokens if row["zeros"] else 0,
    }
    positions = torch.randint(0, MAX_POSITION, (rows,), generator=generator)
    if "group" not in row:
        call |= {"q_nope": draw(tokens, heads, latent), "k_pe": draw(rows, kv_heads, rotary), "pos": positions}
        return call | {"apply_scale": row["scale"], "upcast_operand": row["upcast"]}
    q_nope = draw(heads, tokens, row["nope"])
    q_nope[:, -1] = 0  # what LEAST_ABSMAX is for
    w_uk = draw(heads, latent, row["nope"]).float() / row["nope"] ** 0.5
    w_scale = w_uk.abs().max() / torch.finfo(fp8).max
    tiles = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "GROUP_SIZE_M": row["tile_group"], "num_warps": 4, "num_stages": 2}
    return call | {
        "q_nope": q_nope,
        "w_k": (w_uk / w_scale).to(fp8),
        "w_k_scale": w_scale.reshape(1),
        "k_rope": draw(rows, kv_heads, rotary),
        "positions": positions,
        "k_scale": call["k_scale"] if row["scale"] else None,
        "group_size": row["group"],
        "num_decode_toks_for_zeros": row["zeros"] * tokens // 2,
        "config": {**tiles, "waves_per_eu": 1, "matrix_instr_nonkdim": 16, "cache_modifier": ".cg"},
    }


def aiter_results(machine: Machine, operator: str, calls: list[Call], folder: Path) -> list[Results]:
    """What AITER's `operator` of the checkout AITER_ROOT gives for each call: its four results by name, and kv_cache."""
    request = {"device": machine.device, "arch": machine.told, "calls": [(operator, call) for call in calls]}
    torch.save(request, folder / "request.pt")
    path = (str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if machine.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(PROGRAM), str(folder / "request.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


# What they mean


def model(call: Call, machine: Machine) -> dict[str, Bounded]:
    """q_out [T,H,L+R], kv_entry [rows,KH,L+R] as if every row had a slot, k_pe_out [rows,KH,R], decode_q_pe_out [zeros,H,R]."""
    tokens = call["q_pe"].shape[0]
    positions = call["pos" if "pos" in call else "positions"]
    rotary_key = call["k_pe" if "k_pe" in call else "k_rope"]
    q_pe = rotated(call, call["q_pe"], positions)
    decoded = rotated(call, rotary_key[:tokens], positions)
    prefilled = Bounded.certain(rotary_key[tokens:].double())  # AITER rotates no keys of rows without a query
    k_pe = Bounded(*(torch.cat(pair) for pair in zip(ends(decoded), ends(prefilled), strict=True)))
    ql_nope = absorbed(call, machine) if "w_k" in call else Bounded.certain(call["q_nope"].double())
    k_nope = Bounded.certain(call["k_nope"].double())
    scale = call["k_scale"] if call.get("apply_scale", True) else None
    cache = call["kv_cache"].dtype
    return {
        "q_out": joined(stored(ql_nope, call["q_out_dtype"]), stored(q_pe, call["q_out_dtype"])),
        "kv_entry": joined(*(stored(scaled(each, scale, machine), cache) for each in (k_nope, k_pe))),
        "k_pe_out": stored(k_pe, rotary_key.dtype),
        "decode_q_pe_out": stored(q_pe, call["q_nope"].dtype).map(lambda end: end[: call["num_decode_toks_for_zeros"]]),
    }


def rotated(call: Call, x: torch.Tensor, positions: torch.Tensor) -> Bounded:
    """x [rows,heads,R] times cos plus its turned copy times sin: in fp32 if an operand is that, else each step in the dtype."""
    cos, sin = (call[name].reshape(len(call[name]), -1)[positions[: len(x)]][:, None] for name in ("cos", "sin"))
    dtype = torch.float32 if call.get("upcast_operand") else torch.promote_types(x.dtype, cos.dtype)
    cos, sin, x = cos.double(), sin.double(), x.double()
    if call["is_neox"]:
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    if cos.shape[-1] != x.shape[-1]:
        cos, sin = (torch.cat((t, t), -1) if call["is_neox"] else t.repeat_interleave(2, -1) for t in (cos, sin))
    relative, least = ROUNDING[dtype]
    terms = (x * cos).abs() + (turned * sin).abs()
    return Bounded.around(x * cos + turned * sin, (2 * relative + relative**2) * terms + 3 * least)


def absorbed(call: Call, machine: Machine) -> Bounded:
    """q_nope [H,T,P] times w_k [H,L,P], as [T,H,L]: q_nope goes through fp8, each group of a row with a scale of its own."""
    weights, fp8 = call["w_k"].double(), call["w_k"].dtype
    largest = torch.finfo(fp8).max
    exact = error = torch.zeros(())
    for q, w in zip(call["q_nope"].float().split(call["group_size"], -1), weights.split(call["group_size"], -1), strict=True):
        scale = q.abs().amax(-1, keepdim=True).clamp(min=LEAST_ABSMAX) * torch.tensor(1 / largest)
        values = q.double() / scale.double()
        # The product with a reciprocal that is rounded: a value near a tie may become either neighbour.
        margin = (machine.division + 2 * UNIT_ROUNDOFF) * values.abs()
        low, code, high = (v.clamp(-largest, largest).float().to(fp8).double() for v in (values - margin, values, values + margin))
        magnitude = torch.einsum("htp,hlp->htl", code.abs(), w.abs()) * scale
        exact = exact + torch.einsum("htp,hlp->htl", code, w) * scale
        error = error + torch.einsum("htp,hlp->htl", high - low, w.abs()) * scale
        error = error + (q.shape[-1] + 4) * machine.addend * magnitude + SMALLEST_NORMAL
    scale = call["w_k_scale"].double()
    exact, error = exact * scale, (error + 4 * UNIT_ROUNDOFF * exact.abs()) * scale
    return Bounded.around(exact.transpose(0, 1), error.transpose(0, 1))


def scaled(x: Bounded, scale: torch.Tensor | None, machine: Machine) -> Bounded:
    """x times the rounded reciprocal of `scale`."""
    if scale is None:
        return x
    inverse = float(1.0 / scale)
    exact = x.exact * inverse
    margin = (machine.division + 2 * UNIT_ROUNDOFF) * exact.abs()
    return Bounded(x.low * inverse - margin, exact, x.high * inverse + margin)


def stored(x: Bounded, dtype: torch.dtype) -> Bounded:
    """x rounded to an output's dtype."""
    return x.map(lambda end: end.float().to(dtype).double())


def joined(a: Bounded, b: Bounded) -> Bounded:
    return Bounded(*(torch.cat(pair, -1) for pair in zip(ends(a), ends(b), strict=True)))


def ends(x: Bounded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.low, x.exact, x.high


def unexplained(actual: torch.Tensor, expected: Bounded) -> int:
    """How many elements lie outside the range; NaN always does."""
    values = actual.double()
    return int((~((values >= expected.low) & (values <= expected.high))).sum())


def differences(call: Call, given: Results, expected: dict[str, Bounded]) -> dict[str, int]:
    """For each result how many elements the model does not explain, where that is any."""
    slots = call["slot_mapping"].long()
    kept, zeros = slots >= 0, call["num_decode_toks_for_zeros"]
    entries = expected["kv_entry"].map(lambda end: end[kept])
    others = torch.ones(len(given["kv_cache"]), dtype=torch.bool)
    others[slots[kept]] = False
    found = {
        "q_out": unexplained(given["q_out"], expected["q_out"]),
        "kv_cache": unexplained(given["kv_cache"].double()[slots[kept]], entries),
        "kv_cache elsewhere": int((given["kv_cache"].double()[others] != 0).sum()),
        "k_pe_out": unexplained(given["k_pe_out"][kept], expected["k_pe_out"].map(lambda end: end[kept])),
        "decode_q_pe_out": unexplained(given["decode_q_pe_out"], expected["decode_q_pe_out"]),
        "q_nope_zeros_out": int((given["q_nope_zeros_out"] != 0).sum()),
    }
    assert given["decode_q_pe_out"].shape[0] == given["q_nope_zeros_out"].shape[0] == zeros
    return {name: count for name, count in found.items() if count}
