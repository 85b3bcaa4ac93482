"""W_UK as a kernel's lanes read it, from the model's dtype or from codes."""

import torch

from mlagen.codes import LARGEST_EXPONENT, SMALLEST_EXPONENT, PackedCodes
from mlagen.dtypes import DType
from mlagen.errors import ArgumentError
from mlagen.packing import PADDING, packed_shape, packing_index
from mlagen.quantization import E8M0_BIAS, WeightCodes
from mlagen.tiles import AbsorbTiles

NAN_EXPONENT = 255


def pack_model_weights(w_uk: torch.Tensor, tiles: AbsorbTiles) -> torch.Tensor:
    """w_uk [H,P,L] in the order of packing_index, H in front."""
    heads = w_uk.shape[0]
    index = torch.tensor(packing_index(tiles), device=w_uk.device)
    packed = w_uk.reshape(heads, -1)[:, index.clamp(min=0)]
    if tiles.padded:
        packed[:, index == PADDING] = 0
    return packed.reshape(heads, *packed_shape(tiles))


def pack_codes(codes: WeightCodes, packed: PackedCodes) -> torch.Tensor:
    """Codes and scales as uint8 [H, head_bytes].

    Raises ArgumentError for codes or scales that are no numbers, and for e8m0 scales that are too far apart.
    """
    heads, device = codes.w_uk.shape[0], codes.w_uk.device
    out = torch.zeros(heads, packed.head_bytes, dtype=torch.uint8, device=device)
    raw = _bytes(codes.w_uk) if packed.code.is_fp8 else _nibbles(codes.w_uk)
    if packed.code.is_fp8 and bool(_is_nan(raw, packed.code).any()):
        raise ArgumentError("w_uk: some of its codes are NaN: mend the checkpoint")
    if packed.code.is_fp8 and not bool(codes.scale.isfinite().all()):
        raise ArgumentError("scale: some scales are not finite: mend the checkpoint")
    ordered = _gather(raw, packed.code_index)
    if not packed.code.is_fp8:
        ordered = ordered[:, 0::2] | ordered[:, 1::2] << 4
    out[:, : packed.scales_at] = ordered
    if packed.by_column:
        factors, exponents = _exponents(raw, codes.scale, packed)
        out[:, packed.scales_at : packed.exponents_at] = _bytes(torch.nn.functional.pad(factors[:, None], (0, 3)))
        ordered = _gather(exponents, packed.exponent_index)
        out[:, packed.exponents_at : packed.exponents_at + ordered.shape[1]] = ordered
    else:
        scales = _bytes(codes.scale.reshape(heads, -1).contiguous())
        out[:, packed.scales_at : packed.scales_at + scales.shape[1]] = scales
    return out


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _nibbles(w_uk: torch.Tensor) -> torch.Tensor:
    """e2m1 codes [H,P,L] of bytes [H, P/2, L]; a zero has no sign, which some fp8 could not hold."""
    heads, pairs, lora_rank = w_uk.shape
    codes = torch.stack((w_uk & 0xF, w_uk >> 4), 2).reshape(heads, 2 * pairs, lora_rank)
    return torch.where(codes == 8, 0, codes)


def _is_nan(raw: torch.Tensor, code: DType) -> torch.Tensor:
    return raw == 0x80 if code is DType.E4M3FNUZ else (raw & 0x7F) == 0x7F


def _gather(values: torch.Tensor, places: object) -> torch.Tensor:
    """For each head the values at these places of its flattened rows, zero for padding."""
    index = torch.tensor(places, device=values.device)
    found = values.reshape(values.shape[0], -1)[:, index.clamp(min=0)]
    return torch.where(index == PADDING, 0, found)


def _exponents(raw: torch.Tensor, scale: torch.Tensor, packed: PackedCodes) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head's factor [H], a power of two, and the bytes of its scales [H, P/32, L] beside it."""
    groups = raw.view(raw.shape[0], -1, packed.block[0], raw.shape[2])
    used = (groups != 0).any(2)  # a scale of zeros has no meaning
    exponents = scale.int()
    largest = torch.where(used, exponents, 0).amax((1, 2))
    placed = torch.where(used, LARGEST_EXPONENT + exponents - largest[:, None, None], LARGEST_EXPONENT)
    if bool((scale == NAN_EXPONENT).any()):
        raise ArgumentError("scale: some scales are NaN (byte 255): mend the checkpoint")
    if bool((placed < SMALLEST_EXPONENT).any()):
        apart = LARGEST_EXPONENT - SMALLEST_EXPONENT
        raise ArgumentError(
            f"scale: the scales of one head are more than 2^{apart} apart, expected a smaller range: set the smallest codes to zero"
        )
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float32), largest - E8M0_BIAS), placed.to(torch.uint8)
