"""The kernels of a model that vLLM may ask for, by its cache and its attention, for building them beforehand; needs no torch."""

from typing import Any

from mlagen.dtypes import DType
from mlagen.models import heads_per_rank, resolve_model
from mlagen.target import Target

STATIC_QUANT_LIMIT_FNUZ = 224.0
"""Where vLLM's static quantiser clamps e4m3fnuz, whose own limit is 240."""

AITER_HEADS = 16
"""AITER's MLA decode takes query heads in multiples of this; fewer may also go to its Gluon kernels, to which vLLM hands a pair."""


def fp8_limit(kv_dtype: str, target: Target) -> float | None:
    """A spec's fp8_max beside a cache of this type."""
    return STATIC_QUANT_LIMIT_FNUZ if kv_dtype == "fp8" and target.fp8 is DType.E4M3FNUZ else None


def is_pair(q_dtype: str, heads: int, rope_dim: int) -> bool:
    """Whether AITER's attention gets this query as two tensors."""
    return q_dtype != "fp8" and heads < AITER_HEADS and rope_dim > 0


def deployment_options(model: str, tp: int, target: Target) -> list[dict[str, Any]]:
    """What PrologueSpec.from_model takes, but for the weights, for every kernel that a layer of the model may need on this target.

    These are for an fp8 cache with AITER's attention and with Triton's, and for a cache of the model's dtype; the last two also
    with the query as a pair, where there are few heads.  Raises ModelError.
    """
    shape = resolve_model(model)
    heads, found = heads_per_rank(shape, tp), []
    for q_dtype, kv_dtype in (("fp8", "fp8"), (shape.dtype, "fp8"), (shape.dtype, shape.dtype)):
        for q_split in (False, True)[: 1 + is_pair(q_dtype, heads, shape.rope_dim)]:
            limit = fp8_limit(kv_dtype, target)
            found.append({"q_dtype": q_dtype, "kv_dtype": kv_dtype, "fp8_max": limit, "q_split": q_split})
    return found
