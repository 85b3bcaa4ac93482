"""Calls of AITER's fused_qk_rope_concat_and_cache_mla, by the names of its arguments, and what the oracle says of them."""

from typing import Any

import torch

from mlagen.reference import Bounded, evaluate
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS
from mlagen.torch_types import torch_dtype
from mlagen.verify import compare_outputs, describe

TOKENS, HEADS, LATENT, ROTARY, BLOCKS, BLOCK_SIZE, POSITIONS = 7, 3, 64, 16, 5, 4, 40
NONE_WRITTEN = 0xA5

Call = dict[str, Any]


def make_call(seed: int = 0, *, arch: str = "gfx950", q: str = "fp8", kv: str = "fp8", **changes: Any) -> Call:
    """A call with a slot -1 in the middle."""
    generator = torch.Generator().manual_seed(seed)
    dtype = changes.pop("dtype", torch.bfloat16)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    angles = torch.arange(POSITIONS)[:, None] / 3.0 ** torch.arange(ROTARY // 2)
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=generator)[:TOKENS]
    slots[2] = -1
    types = {"fp8": torch_dtype(TARGETS[arch].fp8), "model": dtype, "bytes": torch.uint8}
    call = {
        "q_nope": draw(TOKENS, HEADS, LATENT),
        "q_pe": draw(TOKENS, HEADS, ROTARY),
        "kv_c": draw(TOKENS, LATENT),
        "k_pe": draw(TOKENS, ROTARY),
        "kv_cache": unwritten(torch.zeros(BLOCKS, BLOCK_SIZE, LATENT + ROTARY, dtype=types[kv])),
        "q_out": unwritten(torch.zeros(TOKENS, HEADS, LATENT + ROTARY, dtype=types[q])),
        "slot_mapping": slots,
        "k_scale": torch.tensor(0.021),
        "q_scale": torch.tensor([0.037]),
        "positions": torch.randint(0, POSITIONS, (TOKENS,), generator=generator),
        "cos_cache": angles.cos().to(dtype),
        "sin_cache": angles.sin().to(dtype),
        "is_neox": False,
        "is_nope_first": True,
        "compute_all_q_rope": False,
    }
    return {**call, **changes}


def segmented(call: Call, *, tail: int = 3) -> Call:
    """The same call of fused_qk_rope_concat_and_cache_mla_seg: a flat cache, and `tail` columns to leave alone in q_out."""
    cache, q_out = call["kv_cache"], call["q_out"]
    flat = unwritten(torch.zeros(BLOCKS, BLOCK_SIZE * (LATENT + ROTARY), dtype=cache.dtype))
    wide = unwritten(torch.zeros(*q_out.shape[:2], q_out.shape[2] + tail, dtype=q_out.dtype))
    return {name: each for name, each in {**call, "kv_cache": flat, "q_out": wide}.items() if name != "compute_all_q_rope"}


def unwritten(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like.view(torch.uint8), NONE_WRITTEN).view(like.dtype)


def oracle(call: Call, arch: str) -> tuple[PrologueSpec, Bounded, Bounded]:
    """What the spec of a call means: all rows of q_out, and all cache entries, those of negative slots too."""
    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    spec = PrologueSpec(
        heads=call["q_nope"].shape[1],
        nope_dim=128,
        lora_rank=call["q_nope"].shape[2],
        rope_dim=call["q_pe"].shape[2],
        rope_style="neox" if call["is_neox"] else "gptj",
        dtype=kinds[call["q_nope"].dtype],
        weight="none",
        q_dtype=kinds.get(call["q_out"].dtype, "fp8"),
        kv_dtype=kinds.get(call["kv_cache"].dtype, "fp8"),
        nope_first=call["is_nope_first"],
    )
    tokens = len(call["slot_mapping"])
    inputs = {
        **{name: call[name][:tokens] for name in ("q_nope", "q_pe", "positions", "slot_mapping")},
        "kv_c": call["kv_c"][:tokens].reshape(tokens, -1),
        "k_pe": call["k_pe"][:tokens].reshape(tokens, -1),
        "cos_sin_cache": torch.cat([call[name].reshape(len(call[name]), -1) for name in ("cos_cache", "sin_cache")], -1),
        "q_scale": call["q_scale"],
        "k_scale": call["k_scale"],
    }
    values = evaluate(spec.program(TARGETS[arch]), inputs)
    return spec, values["q_out"], values["kv_entry"]


def wrong(call: Call, arch: str) -> list[str]:
    """What the oracle does not explain of the outputs that a call filled, a line for each part."""
    spec, q, entry = oracle(call, arch)
    cache = call["kv_cache"]
    if spec.kv_dtype == "fp8":
        cache = cache.view(torch_dtype(TARGETS[arch].fp8))
    cache, slots = cache.flatten(0, -2), call["slot_mapping"].long()
    if call["kv_cache"].dim() == 4:
        cache = cache.reshape(-1, spec.entry_dim)
    kept = slots >= 0
    entries = cache.view(torch.uint8 if cache.dtype.itemsize == 1 else torch.int16)[slots[kept]].view(cache.dtype)
    kept_entry = entry.map(lambda end: end[kept])
    q_out = call["q_out"][: len(slots), : spec.heads]
    others = torch.ones(len(cache), dtype=torch.bool)
    others[slots[kept]] = False
    stray = int((cache.view(torch.uint8)[others] != NONE_WRITTEN).sum())
    expected, outputs = {"q_out": q, "kv_entry": kept_entry}, {"q_out": q_out, "kv_entry": entries}
    compared = compare_outputs(spec, expected, outputs, {"kv_entry": stray})
    return [describe(part) for part in compared if not part.passed]
