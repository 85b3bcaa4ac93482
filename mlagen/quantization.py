"""W_UK in codes: from the model's dtype with the rounding that others use, or as checkpoints and engines already have it."""

import math
from dataclasses import dataclass

import torch

from mlagen.errors import ArgumentError
from mlagen.ir import MX_GROUP, SCALE_BLOCK
from mlagen.spec import PrologueSpec

LARGEST_E2M1 = 6.0
E8M0_BIAS = 127


@dataclass(frozen=True)
class WeightCodes:
    """W_UK in codes: a weight is its code times its scale.

    fp8: w_uk [H,P,L] in the arch's fp8, scale fp32 [H].  fp8-block: the same with scale [H, P/k, L/128], the last rounded up,
    k = gcd(P, 128).
    mxfp4: w_uk uint8 [H, P/2, L] with row 2i of the weights in the low nibble and row 2i + 1 in the high one, scale uint8
    [H, P/32, L], a byte b of which means 2^(b - 127).
    """

    w_uk: torch.Tensor
    scale: torch.Tensor


def quantize_weights(w_uk: torch.Tensor, spec: PrologueSpec, fp8: torch.dtype) -> WeightCodes:
    """The codes of w_uk [H,P,L], bf16 or fp16, for a spec whose weight is "fp8", "fp8-block" or "mxfp4"; `fp8` is the arch's.

    Raises ArgumentError for weights that are not finite.
    """
    if not bool(w_uk.isfinite().all()):
        raise ArgumentError(f"w_uk: it has weights that are not finite, which {spec.weight} codes cannot hold: mend the checkpoint")
    if spec.weight == "fp8":
        return _per_tensor(w_uk, fp8)
    return _per_block(w_uk, fp8) if spec.weight == "fp8-block" else _mxfp4(w_uk)


def _per_tensor(w_uk: torch.Tensor, fp8: torch.dtype) -> WeightCodes:
    """One scale for all, computed and applied in the weights' own dtype, as vLLM and SGLang prepare W_K for AITER."""
    largest = torch.finfo(fp8).max
    # fp16 holds neither 1e-10 nor the factor of small weights: there it ends at its largest number.
    factor = (largest / w_uk.abs().amax().clamp(min=1e-10)).clamp(max=torch.finfo(w_uk.dtype).max)
    codes = (w_uk * factor).clamp(-largest, largest).to(fp8)
    return WeightCodes(codes, factor.float().reciprocal().expand(w_uk.shape[0]).contiguous())


def _per_block(w_uk: torch.Tensor, fp8: torch.dtype) -> WeightCodes:
    """A scale for each block, amax / largest and at least 1e-4 / largest, whose reciprocal meets the weights, as DeepGEMM does."""
    heads, nope_dim, lora_rank = w_uk.shape
    rows, largest = math.gcd(nope_dim, SCALE_BLOCK), torch.finfo(fp8).max
    padded = torch.nn.functional.pad(w_uk.float(), (0, -lora_rank % SCALE_BLOCK))
    blocks = padded.view(heads, nope_dim // rows, rows, -1, SCALE_BLOCK)
    scale = blocks.abs().amax((2, 4)).clamp(min=1e-4) / largest
    codes = (blocks * (1.0 / scale)[:, :, None, :, None]).reshape(padded.shape)[..., :lora_rank].to(fp8)
    return WeightCodes(codes.contiguous(), scale)


def _mxfp4(w_uk: torch.Tensor) -> WeightCodes:
    """As AITER: a group's amax, rounded to two bits behind the leading one, gives the exponent; codes round to nearest even."""
    heads, nope_dim, lora_rank = w_uk.shape
    groups = w_uk.float().view(heads, nope_dim // MX_GROUP, MX_GROUP, lora_rank)
    # Half of the second bit, and the mantissa cut off: 1.75 and more counts as 2.
    rounded = (groups.abs().amax(2).view(torch.int32) + 0x200000) >> 23
    exponents = (rounded - 2).clamp(min=0)
    codes = _e2m1(torch.ldexp(groups, (E8M0_BIAS - exponents)[:, :, None])).view(heads, nope_dim // 2, 2, lora_rank)
    return WeightCodes(codes[:, :, 0] | codes[:, :, 1] << 4, exponents.to(torch.uint8))


def _e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest e2m1 code of each value, ties to the even code, saturating at 6."""
    magnitude = x.abs().clamp(max=LARGEST_E2M1)
    # Codes are evenly spaced below 2, between 2 and 4, and above: halves, ones and twos.
    halves, ones, twos = (magnitude * 2).round(), magnitude.round() + 2, (magnitude / 2).round() + 4
    code = torch.where(magnitude < 2, halves, torch.where(magnitude < 4, ones, twos)).to(torch.uint8)
    return code | x.signbit().to(torch.uint8) << 3


def split_kv_b_proj(weight: torch.Tensor, scale: torch.Tensor, heads: int, nope_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W_UK and its block scales out of a checkpoint's kv_b_proj, as they are: what pack_weights takes for weight="fp8-block".

    weight [H * (P + V), L] fp8, its rows the nope part and then the value part of one head after another; scale
    [H * (P + V) / 128, L / 128] fp32, each rounded up.  Returns w_uk [H,P,L], a view, and scale [H, P/k, L/128], k = gcd(P, 128).
    Raises ArgumentError where the shapes do not fit, or where blocks would be cut inside of k rows.
    """
    rows, columns = weight.shape if weight.dim() == 2 else (0, 0)
    width = rows // heads if heads > 0 else 0
    if not nope_dim < width or width * heads != rows:
        raise ArgumentError(f"weight: shape {list(weight.shape)}, expected [{heads} * ({nope_dim} + V), L], the rows of kv_b_proj")
    expected = (-(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK))
    if tuple(scale.shape) != expected:
        raise ArgumentError(f"scale: shape {list(scale.shape)}, expected {list(expected)}: one for {SCALE_BLOCK} x {SCALE_BLOCK}")
    step = math.gcd(nope_dim, SCALE_BLOCK)
    if width % step:
        raise ArgumentError(
            f"weight: heads of {width} rows put the borders of its blocks inside of {step} rows; "
            "dequantise it and pack it as another weight"
        )
    starts = torch.arange(heads, device=scale.device)[:, None] * width + torch.arange(0, nope_dim, step, device=scale.device)
    return weight.view(heads, width, columns)[:, :nope_dim], scale[starts // SCALE_BLOCK]
