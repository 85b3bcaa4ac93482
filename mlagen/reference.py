"""The oracle: what each stage means, in plain torch, and how far fp32 arithmetic may stray from it.

A value is carried as three tensors: the exact result in fp64, and the lowest and highest values that a kernel may hold which sums
in fp32 in any order.  Every conversion is monotone, so converting the two ends gives the outputs that rounding can explain;
anything outside them is a defect of the kernel.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mlagen.dtypes import DType
from mlagen.ir import (
    ACTIVATION_GROUP,
    LEAST_ACTIVATION,
    LEAST_ROW_SCALE,
    CacheWrite,
    Concat,
    GroupScale,
    Program,
    QAbsorb,
    Quantize,
    Rope,
    RowScale,
    Stage,
)
from mlagen.torch_types import torch_dtype

UNIT_ROUNDOFF = 2.0**-24
"""Largest relative error of one fp32 operation."""

SMALLEST_NORMAL = 2.0**-126
"""Below this an fp32 operation may lose all relative accuracy: a matrix unit may flush subnormals to zero."""


@dataclass(frozen=True)
class Bounded:
    """`exact` with the range [`low`, `high`] in which a kernel's value may lie; three tensors of one shape and type."""

    low: torch.Tensor
    exact: torch.Tensor
    high: torch.Tensor

    @classmethod
    def certain(cls, value: torch.Tensor) -> "Bounded":
        return cls(value, value, value)

    @classmethod
    def around(cls, exact: torch.Tensor, error: torch.Tensor) -> "Bounded":
        """`exact` give or take `error`, both fp64; an infinite or undefined value has no error."""
        error = torch.where(exact.isfinite(), error, 0.0)
        return cls(exact - error, exact, exact + error)

    def map(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> "Bounded":
        """The same monotone conversion of all three."""
        return Bounded(convert(self.low), convert(self.exact), convert(self.high))


def evaluate(program: Program, inputs: Mapping[str, torch.Tensor | None]) -> dict[str, Bounded]:
    """Every value of `program` for the given inputs, on their device.

    Inputs are tensors of the program's types, w_uk unpacked [H,P,L] (e2m1 codes in pairs, [H,P/2,L]), w_scale as the program
    has it, cos_sin_cache joined; kv_cache is not needed.  q_scale and k_scale may be None, meaning 1.  A CacheWrite's
    value is the row that it writes; the slots decide where.
    """
    values: dict[str, Bounded] = {}
    for name, tensor in inputs.items():
        if tensor is not None:
            values[name] = Bounded.certain(tensor.double() if tensor.is_floating_point() else tensor)
    for stage in program.stages:
        values[stage.output] = _MEANINGS[type(stage)](stage, values)
    return values


def _q_absorb(stage: QAbsorb, values: Mapping[str, Bounded]) -> Bounded:
    q, w = values[stage.q_nope].exact, values[stage.w_uk].exact
    terms, steps = q.shape[-1], 2
    if stage.w_scale is not None:
        w = dequantize_weights(w, values[stage.w_scale].exact)
        steps += 2 + terms // 16  # each block of rows has its sum multiplied and added; no block has fewer than 16
    if stage.activation is not None:
        q = quantize_activation(q, stage.activation)
    exact = torch.einsum("thp,hpl->thl", q, w)
    # Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: a sum of n products, in any order.
    error = (terms + steps) * UNIT_ROUNDOFF * torch.einsum("thp,hpl->thl", q.abs(), w.abs()) + terms * SMALLEST_NORMAL
    return _round(Bounded.around(exact, error), stage.dtype)


E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize_weights(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """W_UK [H,P,L] in fp64, each weight its code times its scale.

    codes: fp8 values [H,P,L] in fp64 with scale [H] or [H, P/k, L/128], rounded up; or uint8 [H, P/2, L] with e2m1 codes, that of
    row 2i in the low nibble, and scale uint8 [H, P/32, L], whose byte b means 2^(b - 127), 255 NaN.  Source of the last: OCP
    Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1.
    """
    if codes.dtype is torch.uint8:
        heads, pairs, lora_rank = codes.shape
        values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=torch.float64, device=codes.device)
        both = torch.stack((codes & 0xF, codes >> 4), 2).reshape(heads, 2 * pairs, lora_rank).long()
        factors = torch.where(scale == 255, torch.nan, torch.exp2(scale.double() - 127))
        return values[both] * factors.repeat_interleave(32, dim=1)
    if scale.dim() == 1:
        return codes * scale[:, None, None]
    rows = codes.shape[1] // scale.shape[1]
    return codes * scale.repeat_interleave(rows, dim=1).repeat_interleave(128, dim=2)[..., : codes.shape[2]]


def quantize_activation(q: torch.Tensor, dtype: DType) -> torch.Tensor:
    """q [..., P] rounded to fp8 in groups of 128 columns, as its values in fp64.

    scale = amax(|group|) * (1 / largest), amax at least LEAST_ACTIVATION and blind to NaN; code = rne(x * (1 / scale)), saturating;
    the value is code * scale.  All scales in fp32, each operation rounded.  Source: AITER's Triton kernel
    _fused_fp8_bmm_rope_cat_and_cache_mla_kernel.
    """
    groups = []
    for first in range(0, q.shape[-1], ACTIVATION_GROUP):
        x = q[..., first : first + ACTIVATION_GROUP].float()
        largest = x.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).abs().amax(-1, keepdim=True).clamp(min=LEAST_ACTIVATION)
        scale = largest * torch.tensor(1.0 / dtype.largest, dtype=torch.float32, device=q.device)
        groups.append(saturating_fp8(x * (1.0 / scale), dtype).double() * scale.double())
    return torch.cat(groups, -1)


def _rope(stage: Rope, values: Mapping[str, Bounded]) -> Bounded:
    x, table = values[stage.x].exact, values[stage.cos_sin].exact
    positions = values[stage.positions].exact.long().clamp(0, table.shape[0] - 1)
    half = x.shape[-1] // 2
    rows = table[positions].reshape(-1, *[1] * (x.dim() - 2), 2 * half)
    cos, sin = rows[..., :half], rows[..., half:]
    if stage.style == "gptj":
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = x[..., :half], x[..., half:]
    first, second = a * cos - b * sin, b * cos + a * sin
    error = 3 * UNIT_ROUNDOFF * torch.stack(((a * cos).abs() + (b * sin).abs(), (b * cos).abs() + (a * sin).abs()))
    rotated, errors = (
        torch.stack((one, two), -1).flatten(-2) if stage.style == "gptj" else torch.cat((one, two), -1)
        for one, two in ((first, second), (error[0], error[1]))
    )
    return _round(Bounded.around(rotated, errors + 2 * SMALLEST_NORMAL), stage.dtype)


def _concat(stage: Concat, values: Mapping[str, Bounded]) -> Bounded:
    a, b = values[stage.a], values[stage.b]
    return Bounded(*(torch.cat(parts, -1) for parts in ((a.low, b.low), (a.exact, b.exact), (a.high, b.high))))


def _group_scale(stage: GroupScale, values: Mapping[str, Bounded]) -> Bounded:
    x = values[stage.x].exact  # an input, which lower() sees to: nothing of it is uncertain
    largest = torch.where(x.isnan(), 0.0, x.abs()).reshape(*x.shape[:-1], x.shape[-1] // stage.group, stage.group).amax(-1)
    wanted = (largest / stage.divisor).clamp(min=stage.least)
    mantissa, exponent = torch.frexp(wanted)  # in [1/2, 1)
    power = torch.ldexp(torch.ones_like(wanted), exponent - (mantissa == 0.5).int())
    return Bounded.certain(torch.where(wanted.isfinite(), power, wanted))


def _quantize(stage: Quantize, values: Mapping[str, Bounded]) -> Bounded:
    x = values[stage.x]
    if not stage.dtype.is_fp8:
        return x.map(lambda end: end.float().to(torch_dtype(stage.dtype)))
    scale = values.get(stage.scale) if stage.scale else None
    if scale is not None and 0 < scale.exact.dim() == x.exact.dim() - 1:
        return _quantize_rows(stage, x, scale)
    inverse = torch.ones(()) if scale is None else 1.0 / scale.exact.float()
    if inverse.dim() > 1:  # one for each group of columns
        inverse = inverse.repeat_interleave(x.exact.shape[-1] // inverse.shape[-1], -1)
    else:
        inverse = inverse.reshape(()).to(x.exact.device)
    scaled = x.map(lambda end: end * inverse.double())
    # The kernel rounds the product to fp32: a certain value has a certain product, the ends of a range move apart.
    certain = (x.low == x.high) | x.exact.isnan()
    product = scaled.exact.float().double()
    margin = 2 * UNIT_ROUNDOFF * scaled.exact.abs() + SMALLEST_NORMAL
    scaled = Bounded(
        torch.where(certain, product, scaled.low - margin), product, torch.where(certain, product, scaled.high + margin)
    )
    return scaled.map(lambda end: saturating_fp8(end, stage.dtype, stage.limit))


def _quantize_rows(stage: Quantize, x: Bounded, scale: Bounded) -> Bounded:
    """With a scale for each row, of which only bounds are known, too.

    A kernel's value and its scale may be anywhere within their bounds: the least product and the greatest are at the ends of both.
    """
    small, inverse, large = ((1.0 / each.float()).double().unsqueeze(-1) for each in (scale.high, scale.exact, scale.low))
    low = torch.minimum(x.low * small, x.low * large)
    high = torch.maximum(x.high * small, x.high * large)
    product = (x.exact * inverse).float().double()
    certain = ((x.low == x.high) & (small == large)) | product.isnan()
    margin = 2 * UNIT_ROUNDOFF * torch.maximum(low.abs(), high.abs()) + SMALLEST_NORMAL
    scaled = Bounded(torch.where(certain, product, low - margin), product, torch.where(certain, product, high + margin))
    return scaled.map(lambda end: saturating_fp8(end, stage.dtype, stage.limit))


def _row_scale(stage: RowScale, values: Mapping[str, Bounded]) -> Bounded:
    x = values[stage.x]
    # The magnitudes that a value within its bounds may have: the nearest to zero, and the farthest from it.
    near = torch.where((x.low <= 0) & (x.high >= 0), 0.0, torch.minimum(x.low.abs(), x.high.abs()))
    far = torch.maximum(x.low.abs(), x.high.abs())
    nan = x.exact.isnan()
    largest = Bounded(*(torch.where(nan, 0.0, each).amax(-1) for each in (near, x.exact.abs(), far)))
    return largest.map(lambda end: (end.float() / stage.divisor).clamp(min=LEAST_ROW_SCALE).double())


def _cache_write(stage: CacheWrite, values: Mapping[str, Bounded]) -> Bounded:
    return values[stage.x]


_MEANINGS: Mapping[type[Stage], Callable[..., Bounded]] = {
    QAbsorb: _q_absorb,
    Rope: _rope,
    Concat: _concat,
    GroupScale: _group_scale,
    Quantize: _quantize,
    CacheWrite: _cache_write,
    RowScale: _row_scale,
}


def saturating_fp8(x: torch.Tensor, dtype: DType, limit: float = math.inf) -> torch.Tensor:
    """`x` rounded to nearest even in an fp8 type, saturating at `limit` or the format's own, NaN kept."""
    limit = min(limit, dtype.largest)
    return x.clamp(-limit, limit).float().to(torch_dtype(dtype))


def _round(x: Bounded, dtype: DType) -> Bounded:
    """Rounding to a stage's type; fp32 values stay exact, their range covers the rounding."""
    if dtype is DType.FP32:
        return x
    return x.map(lambda end: end.float().to(torch_dtype(dtype)).double())
