"""Which kernels the project ships: the whole matrix, and the few whose source is checked in."""

from dataclasses import dataclass
from typing import Any

from mlagen.models import PRESETS, resolve_model
from mlagen.spec import WEIGHT_CODES, PrologueSpec
from mlagen.target import TARGETS, Target, find_target

ARCHS = ("gfx942", "gfx950")
"""Architectures of the shipped matrix, and those that are built for where none is named."""

TP_SIZES = (1, 2, 4, 8)
OUTPUT_DTYPES = ("fp8", "model")
"""Types of the query and of the cache; "model" stands for the model's own."""


@dataclass(frozen=True)
class Request:
    """One deployment: a model on one of `tp` ranks, its spec, and the target to build for."""

    model: str
    tp: int
    spec: PrologueSpec
    target: Target


def request(model: str, tp: int, target: Target, **options: Any) -> Request:
    """The request for a model (preset or path), with the options of PrologueSpec.from_model.  Raises ModelError or SpecError."""
    spec = PrologueSpec.from_model(model, tp=tp, **options)
    spec.program(target)
    return Request(resolve_model(model).name, tp, spec, target)


def shipped_matrix() -> list[Request]:
    """Every preset at every TP size that divides its heads, for every target and every query and cache type.

    Weights in codes come with what they are deployed with: an fp8 query and an fp8 cache.
    """
    outputs = [(None, q, kv) for q in OUTPUT_DTYPES for kv in OUTPUT_DTYPES]
    return [
        request(
            name,
            tp,
            target,
            weight=weight,
            q_dtype=shape.dtype if q == "model" else q,
            kv_dtype=shape.dtype if kv == "model" else kv,
        )
        for target in map(find_target, ARCHS)
        for name, shape in PRESETS.items()
        for tp in TP_SIZES
        if shape.heads % tp == 0
        for weight, q, kv in outputs + [(weight, "fp8", "fp8") for weight in WEIGHT_CODES]
    ]


def representative() -> list[Request]:
    """The kernels whose source is checked in under generated/: between them they show every stage, dtype and tile."""
    gfx942, gfx950 = TARGETS["gfx942"], TARGETS["gfx950"]
    return [
        request("deepseek-r1", 8, gfx942),
        request("deepseek-r1", 8, gfx950),
        request("deepseek-r1", 8, gfx950, q_dtype="bf16", kv_dtype="bf16"),
        request("deepseek-r1", 8, gfx942, rounding="stepwise", fp8_max=224),
        request("deepseek-r1", 8, gfx950, weight="none"),
        request("kimi-k3", 8, gfx950),
        request("glm-4.7-lite", 1, gfx950),
        request("glm5-next", 8, gfx942, q_dtype="bf16"),
        request("minicpm3", 1, gfx942),
        request("deepseek-r1", 8, gfx950, weight="fp8"),
        request("deepseek-r1", 8, gfx942, weight="mxfp4"),
    ]
