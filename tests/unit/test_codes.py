"""Packed codes: a packed head read as the lanes of each instruction read it, and what cannot be packed.

The reading knows the instructions' own lane maps and how each platform takes a word of codes apart, and nothing of the packing.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

from mlagen.codegen import GeneratedKernel, generate
from mlagen.codes import HEAD_ALIGNMENT, NIBBLE_ORDER, PackedCodes, packed_head_shape
from mlagen.dtypes import DType
from mlagen.errors import ArgumentError, ScheduleError
from mlagen.layout import Layout
from mlagen.packed_weights import pack_codes
from mlagen.packing import PADDING
from mlagen.quantization import WeightCodes, quantize_weights
from mlagen.reference import E2M1_VALUES, dequantize_weights
from mlagen.runtime import load
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS
from mlagen.torch_types import torch_dtype

HEADS = 2
SHAPES = {
    "fp8": [(128, 512), (192, 512), (48, 96), (16, 80), (208, 160), (256, 576)],
    "fp8-block": [(128, 512), (192, 512), (64, 160), (96, 80), (256, 576), (32, 144)],
    "mxfp4": [(128, 512), (192, 512), (64, 160), (96, 80), (256, 576), (32, 16), (512, 64)],
    "a8": [(128, 512), (192, 512), (48, 96), (16, 80), (208, 160), (256, 576)],
}
WIDER = "sm_90, two tiles"
"""An arch where an entry of a table may ask for more latent columns of a wave than the rule says."""

CASES = [
    (arch, weight, *shape)
    for arch in (*TARGETS, WIDER)
    for weight, shapes in SHAPES.items()
    for shape in shapes
    if arch != WIDER or (shape[1] % 32 == 0 and shape[0] < 512)  # 512 rows take too many registers
]


def spec_of(weight: str, nope_dim: int, lora_rank: int) -> PrologueSpec:
    """`weight` may also be "a8"."""
    kind = {"weight": "fp8", "compute": "a8"} if weight == "a8" else {"weight": weight}
    return PrologueSpec(heads=HEADS, nope_dim=nope_dim, lora_rank=lora_rank, rope_dim=0, rope_style="none", **kind)


def made(arch: str, weight: str, nope_dim: int = 128, lora_rank: int = 512) -> tuple[GeneratedKernel, PackedCodes, WeightCodes]:
    """A kernel, how its codes lie, and codes in which few neighbours are alike."""
    spec, target = spec_of(weight, nope_dim, lora_rank), TARGETS[arch.partition(",")[0]]
    generated = generate(spec, target, Layout(m_tiles=2 if arch == WIDER else None))
    assert generated.codes is not None
    generator = torch.Generator().manual_seed(1)
    w_uk = torch.randn(HEADS, nope_dim, lora_rank, generator=generator)
    w_uk = torch.ldexp(w_uk, torch.randint(-3, 4, (HEADS, nope_dim // 16, lora_rank), generator=generator).repeat_interleave(16, 1))
    codes = quantize_weights(w_uk.to(torch.bfloat16), spec, torch_dtype(target.fp8))
    if codes.scale.dim() == 1:
        codes = WeightCodes(codes.w_uk, codes.scale * torch.arange(1, HEADS + 1))
    return generated, generated.codes, codes


def values(codes: WeightCodes) -> torch.Tensor:
    return dequantize_weights(codes.w_uk if codes.w_uk.dtype is torch.uint8 else codes.w_uk.double(), codes.scale)


# A head as lanes read it.

FP8_VALUES = {
    dtype: torch.arange(256).to(torch.uint8).view(torch_dtype(dtype)).double().numpy() for dtype in (DType.E4M3FN, DType.E4M3FNUZ)
}


class Amd:
    """MFMA 16x16: lane % 16 is a row of A and a column of B, lane / 16 a run of k; a lane's 4 sums are rows below each other."""

    def __init__(self, arch: str, element_bytes: int) -> None:
        self.lanes, self.k = 64, 16 if arch == "gfx942" and element_bytes == 2 else 32
        self.held_of_a = self.held_of_b = self.k // 4

    def a(self, lane: int, register: int) -> tuple[int, int]:
        return lane % 16, lane // 16 * self.held_of_a + register

    def b_k(self, lane: int, register: int, held: int) -> int:
        return lane // 16 * held + register

    def latent(self, m: int, m_tile: int, m_tiles: int) -> int:
        return m // 4 * 4 * m_tiles + m_tile * 4 + m % 4

    def scale_of(self, lane: int, register: int) -> tuple[int, int, int]:
        """(group of lanes, number of the row among those that a lane holds, how many it holds)"""
        return lane % 16, 0, 1

    def nibble(self, element: int) -> int:
        return 2 * element if element < 4 else 2 * (element - 4) + 1


class Nvidia:
    """mma.m16n8: lane / 4 is a row of A and of D, and a column of B, lane % 4 a word of k; words of the row 8 below take turns."""

    def __init__(self, arch: str, element_bytes: int) -> None:
        self.lanes, self.word = 32, 4 // element_bytes
        self.k, self.held_of_a, self.held_of_b = 8 * self.word, 4 * self.word, 2 * self.word

    def a(self, lane: int, register: int) -> tuple[int, int]:
        word, place = divmod(register, self.word)
        return lane // 4 + word % 2 * 8, lane % 4 * self.word + place + word // 2 * 4 * self.word

    def b_k(self, lane: int, register: int, held: int) -> int:
        word, place = divmod(register, self.word)
        return lane % 4 * self.word + place + word * 4 * self.word

    def latent(self, m: int, m_tile: int, m_tiles: int) -> int:
        return m % 8 * 2 * m_tiles + m_tile * 2 + m // 8

    def scale_of(self, lane: int, register: int) -> tuple[int, int, int]:
        return lane // 4, register // self.word % 2, 2

    def nibble(self, element: int) -> int:
        return element // 2 + element % 2 * 4


def read_head(head: np.ndarray, generated: GeneratedKernel, arch: str, weight: str, nope_dim: int, lora_rank: int) -> np.ndarray:
    """W_UK [P,L] of the bytes of one packed head; a place that no lane reads, or two, fails."""
    a8, mx = weight == "a8", weight == "mxfp4"
    machine = (Amd if arch.startswith("gfx") else Nvidia)(arch, 1 if a8 else 2)
    m_tiles = generated.schedule.absorb.m_tiles
    per_fragment = 16 if a8 else 8  # k of a lane's 16 bytes of q
    instructions = per_fragment // machine.held_of_b
    chunk_k = machine.k * instructions
    chunks, l_tiles = -(-nope_dim // chunk_k), lora_rank // (16 * m_tiles)
    held = instructions * machine.held_of_a  # codes of a lane, chunk and m tile
    loads = -(-chunks * m_tiles * held // (32 if mx else 16))
    scales_at = l_tiles * loads * machine.lanes * 16
    # Where q's k number i of an instruction comes from: its lane loads neighbouring k of a row, and gives them in turn.
    k_of = {}
    for lane in range(machine.lanes):
        run = machine.b_k(lane, 0, machine.held_of_b) // machine.b_k(16 if machine.lanes == 64 else 1, 0, machine.held_of_b)
        for register in range(machine.held_of_b):
            k_of[machine.b_k(lane, register, machine.held_of_b)] = run * per_fragment + register
    w = np.full((nope_dim, lora_rank), np.nan)
    floats = head[scales_at : len(head) // 4 * 4].view(np.float32)
    words = -(-chunks * m_tiles * machine.scale_of(0, 0)[2] // 4)
    words = next(size for size in (1, 2, 4, 8, 16) if size >= words)
    groups = 16 if machine.lanes == 64 else 8
    for l_tile, chunk, m_tile, lane in np.ndindex(l_tiles, chunks, m_tiles, machine.lanes):
        for register in range(held):
            instruction, within = divmod(register, machine.held_of_a)
            m, k = machine.a(lane, within)
            p = chunk * chunk_k + k_of[k] + instruction * machine.held_of_b
            column = l_tile * 16 * m_tiles + machine.latent(m, m_tile, m_tiles)
            number = (chunk * m_tiles + m_tile) * held + register  # of the lane's codes
            load, place = divmod(number, 32 if mx else 16)
            at = ((l_tile * loads + load) * machine.lanes + lane) * 16
            if mx:
                nibble = place // 8 * 8 + machine.nibble(place % 8)
                code = head[at + nibble // 2] >> nibble % 2 * 4 & 0xF
                group, row, rows = machine.scale_of(lane, within)
                byte = scales_at + 16 + (l_tile * groups + group) * words * 4 + (chunk * m_tiles + m_tile) * rows + row
                value = E2M1_VALUES[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (int(head[byte]) - 253) * float(floats[0])
                assert 128 <= head[byte] <= 253
            else:
                code = head[at + place]
                value = FP8_VALUES[TARGETS[arch].fp8][code]
            if p >= nope_dim:
                assert code == 0, "padding that is not zero"
                continue
            if weight == "fp8-block":
                block = math.gcd(nope_dim, 128)
                value *= float(floats[p // block * -(-lora_rank // 128) + column // 128])
            elif not mx:
                value *= float(floats[0])
            assert np.isnan(w[p, column]), "read twice"
            w[p, column] = value
    assert not np.isnan(w).any(), "never read"
    return w


@pytest.mark.parametrize(("arch", "weight", "nope_dim", "lora_rank"), CASES)
def test_lanes_read_what_was_packed(arch, weight, nope_dim, lora_rank):
    generated, packed, codes = made(arch, weight, nope_dim, lora_rank)
    out = pack_codes(codes, packed)
    assert out.shape == (HEADS, *packed_head_shape(generated.schedule.absorb, packed))
    assert out.dtype is torch.uint8
    found = read_head(out[1].numpy(), generated, generated.arch, weight, nope_dim, lora_rank)
    assert np.array_equal(found, values(codes)[1].numpy())


@pytest.mark.parametrize(("arch", "weight", "nope_dim", "lora_rank"), CASES)
def test_each_code_and_each_scale_has_one_place(arch, weight, nope_dim, lora_rank):
    generated, packed, _ = made(arch, weight, nope_dim, lora_rank)
    index = packed.code_index
    assert sorted(index[index != PADDING]) == list(range(nope_dim * lora_rank))
    assert packed.scales_at == len(index) * packed.bits // 8
    assert packed.scales_at % 16 == packed.exponents_at % 16 == packed.tile_exponents % 4 == 0
    assert packed.head_bytes % HEAD_ALIGNMENT == 0
    end = packed.scales_at + 4 * packed.row_blocks * packed.column_blocks
    if weight == "mxfp4":
        places = packed.exponent_index
        assert sorted(places[places != PADDING]) == list(range(nope_dim // 32 * lora_rank))
        end = packed.exponents_at + len(places)
    assert end <= packed.head_bytes < end + HEAD_ALIGNMENT
    assert f"HEAD_BYTES = {packed.head_bytes};" in generated.source


def test_the_bytes_are_a_half_and_a_quarter():
    """Of the 131072 bytes of a head in bf16; scales and the alignment are the rest."""
    sizes = {weight: made("gfx950", weight)[1].head_bytes for weight in SHAPES}
    assert sizes == {"fp8": 65536 + 256, "fp8-block": 65536 + 256, "mxfp4": 32768 + 2304, "a8": 65536 + 256}


@pytest.mark.parametrize("platform", NIBBLE_ORDER)
def test_a_word_holds_each_of_its_codes(platform):
    assert sorted(NIBBLE_ORDER[platform]) == list(range(8))


# What is no block for the tiles.


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ((16, 512), "scales of 16 rows of W_UK: a wave multiplies 32 at a time"),
        ((48, 128), "scales of 48 rows of W_UK: a wave multiplies 32 at a time"),
        ((128, 96), "scales of 96 columns of W_UK: a wave has 64 of them"),
        ((64, 1), "scales of 64 rows of one column: a wave multiplies 32 at a time"),
    ],
)
def test_blocks_that_end_inside_of_a_tile_are_refused(block, message):
    _, packed, _ = made("gfx950", "fp8")
    with pytest.raises(ScheduleError) as caught:
        dataclasses.replace(packed, block=block)
    assert str(caught.value) == message


# What is no weight.


def test_codes_that_are_nan_are_refused():
    """0x80 is NaN in FNUZ and a zero in OCP; 0x7f and 0xff are NaN in OCP and numbers in FNUZ."""
    for arch, codes_of in (("gfx942", {0x80: True, 0x7F: False, 0xFF: False}), ("gfx950", {0x80: False, 0x7F: True, 0xFF: True})):
        for code, refused in codes_of.items():
            _, packed, codes = made(arch, "fp8")
            codes.w_uk.view(torch.uint8)[1, 127, 511] = code
            if refused:
                with pytest.raises(ArgumentError, match=r"^w_uk: some of its codes are NaN: mend the checkpoint"):
                    pack_codes(codes, packed)
            else:
                pack_codes(codes, packed)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("weight", ["fp8", "fp8-block", "a8"])
def test_scales_that_are_not_finite_are_refused(weight, bad):
    _, packed, codes = made("gfx950", weight)
    codes.scale[(-1,) * codes.scale.dim()] = bad
    with pytest.raises(ArgumentError, match=r"^scale: some scales are not finite: mend the checkpoint"):
        pack_codes(codes, packed)


@pytest.mark.parametrize("zeros", [False, True], ids=["codes", "zeros"])
def test_e8m0_scales_that_are_nan_are_refused(zeros):
    """Of a group of zeros too: what it means is no number."""
    _, packed, codes = made("gfx950", "mxfp4")
    codes.scale[1, 3, 511] = 255
    if zeros:
        codes.w_uk[1, 48:, 511] = 0
    with pytest.raises(ArgumentError, match=r"^scale: some scales are NaN \(byte 255\): mend the checkpoint"):
        pack_codes(codes, packed)


def mx_with_scales(first: int, second: int, *, zeros: bool = False) -> WeightCodes:
    """All ones, with the scale `second` for the last group of one column of the second head, which may be zeros."""
    codes = torch.full((HEADS, 64, 512), 0x22, dtype=torch.uint8)
    scale = torch.full((HEADS, 4, 512), first, dtype=torch.uint8)
    scale[1, 3, 511] = second
    if zeros:
        codes[1, 48:, 511] = 0x80  # one of them negative
    return WeightCodes(codes, scale)


@pytest.mark.parametrize("arch", TARGETS)
def test_scales_of_one_head_lie_within_a_range(arch):
    generated, packed, _ = made(arch, "mxfp4")
    for first, second in ((254, 129), (254, 130), (130, 5), (125, 0), (0, 125)):
        codes = mx_with_scales(first, second)
        found = read_head(pack_codes(codes, packed)[1].numpy(), generated, arch, "mxfp4", 128, 512)
        assert np.array_equal(found, values(codes)[1].numpy())
    for first, second in ((254, 128), (126, 0), (0, 126)):
        with pytest.raises(ArgumentError, match=r"^scale: the scales of one head are more than 2\^125 apart"):
            pack_codes(mx_with_scales(first, second), packed)


def test_the_scale_of_zeros_has_no_meaning():
    """However far from the others it is; and a negative zero is a zero, which FNUZ has no other code for."""
    generated, packed, _ = made("gfx942", "mxfp4")
    for other in (0, 254):
        codes = mx_with_scales(127, other, zeros=True)
        out = pack_codes(codes, packed)
        assert not (out[1, : packed.scales_at] & 0x88).any()
        found = read_head(out[1].numpy(), generated, "gfx942", "mxfp4", 128, 512)
        assert np.array_equal(found, values(codes)[1].numpy())


def test_a_head_of_zeros():
    generated, packed, _ = made("gfx950", "mxfp4")
    codes = quantize_weights(torch.zeros(HEADS, 128, 512, dtype=torch.bfloat16), spec_of("mxfp4", 128, 512), torch.float8_e4m3fn)
    assert not read_head(pack_codes(codes, packed)[0].numpy(), generated, "gfx950", "mxfp4", 128, 512).any()


# What pack_weights takes.


def packed_by(weight: str, w_uk: torch.Tensor, scale: torch.Tensor | None, nope_dim: int = 192) -> torch.Tensor:
    return load(spec_of(weight, nope_dim, 160), "cpu", arch="gfx950").pack_weights(w_uk, scale)


@pytest.mark.host
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (HEADS,), (HEADS, 1), (HEADS, 1, 1)], ids=str)
def test_a_scale_for_all_or_for_each_head(shape):
    w_uk = made("gfx950", "fp8", 192, 160)[2].w_uk
    scale = torch.arange(1.0, math.prod(shape) + 1).reshape(shape) / 8
    whole = scale.reshape(-1).expand(HEADS)
    packed = made("gfx950", "fp8", 192, 160)[1]
    assert torch.equal(packed_by("fp8", w_uk, scale), pack_codes(WeightCodes(w_uk, whole), packed))


@pytest.mark.host
@pytest.mark.parametrize("nope_dim", [192, 96, 256])
def test_block_scales_for_128_rows_or_for_those_that_share_them(nope_dim):
    _, packed, codes = made("gfx950", "fp8-block", nope_dim, 160)
    step = math.gcd(nope_dim, 128)
    whole = torch.arange(1.0, HEADS * -(-nope_dim // 128) * 2 + 1).reshape(HEADS, -1, 2)
    rows = torch.arange(0, nope_dim, step) // 128
    expected = pack_codes(WeightCodes(codes.w_uk, whole[:, rows]), packed)
    for scale in (whole, whole[:, rows]):
        assert torch.equal(packed_by("fp8-block", codes.w_uk, scale, nope_dim), expected)


@pytest.mark.host
def test_codes_of_any_strides_and_names():
    """AITER's w_k [H, L, P/2] and its scales, transposed, and under torch's names of the types."""
    _, packed, codes = made("gfx950", "mxfp4", 192, 160)
    expected = pack_codes(codes, packed)
    w_k, scale = codes.w_uk.mT.contiguous().mT, codes.scale.mT.contiguous().mT
    assert not w_k.is_contiguous()
    assert torch.equal(packed_by("mxfp4", w_k, scale), expected)
    names = [getattr(torch, name, None) for name in ("float4_e2m1fn_x2", "float8_e8m0fnu")]
    if all(names):
        assert torch.equal(packed_by("mxfp4", w_k.view(names[0]), scale.view(names[1])), expected)


@pytest.mark.host
@pytest.mark.parametrize("weight", ["fp8", "fp8-block", "mxfp4"])
def test_the_models_dtype_is_quantised(weight):
    _, packed, _ = made("gfx950", weight, 192, 160)
    w_uk = torch.randn(HEADS, 192, 160, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    expected = pack_codes(quantize_weights(w_uk, spec_of(weight, 192, 160), torch.float8_e4m3fn), packed)
    assert torch.equal(packed_by(weight, w_uk, None), expected)


@pytest.mark.host
@pytest.mark.parametrize(
    ("weight", "change", "message"),
    [
        ("fp8", lambda w, s: (w, None), r"^scale: got NoneType, expected a tensor, the scales of the codes in w_uk"),
        ("fp8", lambda w, s: (w, 1.0), r"^scale: got float"),
        ("fp8", lambda w, s: (w, s[:1].repeat(3)), r"^scale: shape \[3\], expected \[\] or \[1\] for all heads, or \[2\]"),
        ("fp8", lambda w, s: (w, s.half()), r"^scale: dtype float16"),
        ("fp8", lambda w, s: (w.view(torch.uint8), s), r"^w_uk: dtype uint8"),
        ("fp8", lambda w, s: (w.view(torch.float8_e4m3fnuz), s), r"^w_uk: dtype float8_e4m3fnuz"),
        ("fp8", lambda w, s: (w.to(torch.bfloat16), s), r"^scale: w_uk is bfloat16 and has none"),
        ("fp8-block", lambda w, s: (w, s[:, :1]), r"^scale: shape \[2, 1, 2\], expected \[2, 3, 2\]"),
        ("fp8-block", lambda w, s: (w, s[0, 0, 0]), r"^scale: shape \[\], expected \[2, 3, 2\]"),
        ("mxfp4", lambda w, s: (w[:, :90], s), r"^w_uk: \[2, 90, 160\], expected a tensor \[2, 96, 160\] as \[H, P/2, L\]"),
        ("mxfp4", lambda w, s: (w, s.mT), r"^scale: shape \[2, 160, 6\], expected \[2, 6, 160\]"),
        ("mxfp4", lambda w, s: (w, s.float()), r"^scale: dtype float32"),
        ("mxfp4", lambda w, s: (w, None), r"^scale: got NoneType"),
    ],
)
def test_wrong_codes_and_scales_are_named(weight, change, message):
    codes = made("gfx950", weight, 192, 160)[2]
    with pytest.raises(ArgumentError, match=message):
        packed_by(weight, *change(codes.w_uk, codes.scale))
