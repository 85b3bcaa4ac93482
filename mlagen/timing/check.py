"""Whether what was timed computes the right thing: each method's results against the oracle, on the device that computed them.

mlagen's own kernel must be explained to the last bit, as in `mlagen verify`.  Other methods round at other places; of them a whole
row is compared, whose relative error no rounding to the formats on its way can take beyond the sum of those formats' roundings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mlagen.cache_layout import entries, values
from mlagen.dtypes import model_dtype
from mlagen.ir import Quantize
from mlagen.reference import Bounded, evaluate
from mlagen.timing.workload import Workload
from mlagen.torch_types import torch_dtype
from mlagen.verify import compare_outputs, describe, expected_entries

ROUNDINGS_IN_BETWEEN = 4
"""How often separate operators may round to the model's dtype before the last conversion: a product, and three times in RoPE."""


@dataclass(frozen=True)
class Oracle:
    """What the program of a workload's spec gives for one of its layers, and the cache that a method leaves there."""

    workload: Workload
    layer: int
    values: Mapping[str, Bounded]

    @classmethod
    def of(cls, workload: Workload, layer: int) -> "Oracle":
        inputs = {
            "q_nope": workload.q_nope,
            "q_pe": workload.q_pe,
            "kv_c": workload.kv_c,
            "k_pe": workload.k_pe,
            "w_uk": workload.w_uk[layer] if workload.w_uk else None,
            **({"w_uk": workload.codes[layer].w_uk, "w_scale": workload.codes[layer].scale} if workload.codes else {}),
            "cos_sin_cache": workload.cos_sin_cache,
            "positions": workload.positions,
            "slot_mapping": workload.slot_mapping,
            "q_scale": workload.q_scale,
            "k_scale": workload.k_scale,
        }
        return cls(workload, layer, evaluate(workload.spec.program(workload.target), inputs))

    def unrounded(self, output: str) -> torch.Tensor:
        """The rows of "q_out" or "kv_entry" in fp64, before their scale and their conversion."""
        stages = self.workload.spec.program(self.workload.target).stages
        (x,) = (stage.x for stage in stages if isinstance(stage, Quantize) and stage.output == output)
        return self.values[x].exact

    def entries(self) -> torch.Tensor:
        """[T, L+R]: the cache's rows at the workload's slots, in the cache's dtype; those of fp8_ds_mla as numbers."""
        workload = self.workload
        return values(workload.spec, workload.target, entries(workload.spec, workload.paged(self.layer), workload.slot_mapping))


Check = Callable[[Oracle, Any], str]
"""What is wrong with a method's result, and with the cache that it left; "" if nothing."""


def nothing(oracle: Oracle, result: object) -> str:
    """For what computes nothing."""
    return ""


def explained(oracle: Oracle, result: Any) -> str:
    """What the kernel returned, and cache entries, of which fp32 arithmetic explains every element."""
    spec = oracle.workload.spec
    outputs = dict(zip(spec.q_results, result if isinstance(result, tuple) else (result,), strict=False))
    expected = dict(oracle.values)
    if spec.write_kv:
        expected["kv_entry"], outputs["kv_entry"] = expected_entries(spec, oracle.values), oracle.entries()
    compared = compare_outputs(spec, expected, outputs)
    return "; ".join(describe(part) for part in compared if not part.passed)


def product(oracle: Oracle, result: torch.Tensor) -> str:
    """ql_nope [T,H,L] alone."""
    exact = oracle.values["ql_nope"].exact
    return _distance("ql_nope", result.double(), exact, ROUNDINGS_IN_BETWEEN * _roundoff(result.dtype))


def rounded(oracle: Oracle, result: torch.Tensor, *, absorb_error: float = 0.0) -> str:
    """q_out and cache entries of separate operators; q_out counts as its values where it is not fp8 although the spec's is.

    `absorb_error` is what the absorb may be off besides, as a share of a row, because its operands were rounded.
    """
    workload = oracle.workload
    nope, pe = workload.spec.nope_columns, workload.spec.rope_columns
    in_between = ROUNDINGS_IN_BETWEEN * _roundoff(torch_dtype(model_dtype(workload.spec.dtype)))
    found = []
    entries = oracle.entries()
    for name, codes, scale, more in (
        ("q_out", result, workload.q_scale, absorb_error),
        ("kv_entry", entries, workload.k_scale, 0.0),
    ):
        is_fp8 = codes.dtype.itemsize == 1
        values = codes.double() * (scale.double() if is_fp8 else 1.0)
        exact = oracle.unrounded(name)
        allowed = in_between + _roundoff(codes.dtype)
        found.append(_distance(f"{name} nope", values[..., nope], exact[..., nope], allowed + more))
        if workload.spec.rope_dim:
            found.append(_distance(f"{name} pe", values[..., pe], exact[..., pe], allowed))
    return "; ".join(filter(None, found))


def _roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def _distance(name: str, values: torch.Tensor, exact: torch.Tensor, allowed: float) -> str:
    """What is to be said of the row that is furthest off, if it is too far; a NaN is."""
    if values.shape != exact.shape:
        return f"{name}: shape {list(values.shape)} instead of {list(exact.shape)}"
    errors = torch.linalg.vector_norm(values - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)
    worst = float(errors.nan_to_num(nan=torch.inf).max())
    return "" if worst <= allowed else f"{name}: a row is off by {100 * worst:.3g} %, rounding explains {100 * allowed:.3g} %"
