"""Defects put into the generated code, each of which must show: the proof that the other tests would see them.

A mutation is an exact replacement in the host source; a text that is no longer there fails the test, so that none vanishes.
"""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from helpers import Launch, Workload, build_kernel, failures, make_launch, small_spec

from mlagen import packed_weights, packing
from mlagen.codegen import MARK, GeneratedKernel, generate, kernel_name, render
from mlagen.dtypes import DType
from mlagen.lowering import lower
from mlagen.runtime import Kernel, load
from mlagen.schedule import choose_schedule
from mlagen.spec import PrologueSpec
from mlagen.target import Digit, FragmentMap, find_target

pytestmark = pytest.mark.host

SPECS = {
    "gptj": small_spec(),
    "neox": small_spec(rope_style="neox", kv_dtype="bf16"),
    "stepwise": small_spec(rounding="stepwise"),
    "same": small_spec(q_dtype="bf16", kv_dtype="bf16", rope_style="none"),
    "fp16": small_spec(dtype="fp16", q_dtype="fp16"),
    "rope first": small_spec(nope_first=False),
    "segmented": small_spec(kv_layout="segmented"),
    "KV heads": small_spec(kv_heads=3),
    "fp8_ds_mla": small_spec(kv_layout="fp8_ds_mla", lora_rank=256),
    "cache only": small_spec(write_q=False),
    "query only": small_spec(write_kv=False),
    "split": small_spec(q_split=True),
    "fp8 weights": small_spec(weight="fp8"),
    "fp8-block": small_spec(weight="fp8-block", nope_dim=192, lora_rank=160),
    "mxfp4": small_spec(weight="mxfp4", nope_dim=96),
    "a8": small_spec(weight="fp8", compute="a8", nope_dim=208),
    "token": small_spec(q_scaling="token"),
    "token, neox": small_spec(q_scaling="token", rope_style="neox"),
    "token, absorbed": small_spec(q_scaling="token", weight="none"),
    "token, passes": small_spec(q_scaling="token", nope_dim=192, lora_rank=512),
}

# Guard bytes surround what a mutation may reach: one token past the last (31 of two tiles of 16), the slot before the first.
WORKLOAD = Workload(tokens=31, special=True)
SMALL_BLOCKS = Workload(tokens=31, block_size=2)  # with the strides exchanged, all addresses stay inside the cache
UNIT_SCALES = Workload(tokens=31, scales="none")  # ties are frequent only without a scale
NARROW_POSITIONS = Workload(tokens=31, positions_dtype=torch.int32)


@dataclass(frozen=True)
class Mutation:
    name: str
    old: str
    new: str
    spec: str = "gptj"
    arch: str = "gfx942"
    workload: Workload = WORKLOAD


MUTATIONS = (
    # RoPE
    Mutation("rope sign", "a * cos - b * sin", "a * cos + b * sin"),
    Mutation("rope second sign", "b * cos + a * sin", "b * cos - a * sin", spec="neox"),
    Mutation("rope of a rotated partner", "rotated = a * cos - b * sin;", "rotated = a = a * cos - b * sin;"),
    Mutation("cos and sin swapped", "column / 2, cos, sin);", "column / 2, sin, cos);"),
    Mutation("tables swapped", "static_cast<const bf16*>(args.cos) + cos_at", "static_cast<const bf16*>(args.sin) + sin_at"),
    Mutation("first pair of a piece", "column / 2, cos", "column, cos"),
    Mutation("neox halves exchanged", "rotate<8>(low, high, cos, sin)", "rotate<8>(high, low, cos, sin)", spec="neox"),
    Mutation("neox partner is the neighbour", "load(from + 16, high)", "load(from + 8, high)", spec="neox"),
    Mutation("gptj pairs as neox", "x[2 * i], x[2 * i + 1], cos[i]", "x[i], x[i + PAIRS], cos[i]"),
    Mutation("positions not clamped below", "position < 0 ? 0 : position", "position"),
    Mutation("positions not clamped above", "position < args.max_position ? position : args.max_position - 1", "position"),
    Mutation("positions clamped one early", ": args.max_position - 1", ": args.max_position - 2"),
    Mutation("positions of one token for all", "load_index(args.positions, token,", "load_index(args.positions, 0,"),
    Mutation("int32 positions as int64", "token, args.positions_int64)", "token, 1)", workload=NARROW_POSITIONS),
    # cache
    Mutation(
        "negative slots taken for 0",
        "slot = load_index(args.slot_mapping, token, args.slots_int64);",
        "slot = std::max<int64_t>(0, load_index(args.slot_mapping, token, args.slots_int64));",
    ),
    Mutation("slot 0 taken for none", "if (slot < 0) return;", "if (slot <= 0) return;"),
    Mutation(
        "strides exchanged",
        "block * args.block_stride + place * args.entry_stride",
        "block * args.entry_stride + place * args.block_stride",
        workload=SMALL_BLOCKS,
    ),
    Mutation("block padding ignored", "block * args.block_stride", "block * args.block_size * args.entry_stride"),
    Mutation("slot by token", "load_index(args.slot_mapping, token, args.slots_int64)", "token"),
    Mutation(
        "latent offset", "q_out_row(args, token, head) + 32 + l_tile", "q_out_row(args, token, head) + l_tile", spec="rope first"
    ),
    Mutation(
        "rotary offset", "q_out_row(args, token, head) + column", "q_out_row(args, token, head) + 96 + column", spec="rope first"
    ),
    Mutation("column offset", "cache_entry(args, slot) + 96 + column", "cache_entry(args, slot) + 94 + column"),
    Mutation("rope before nope in the cache", "cache_entry(args, slot) + 96 + column", "cache_entry(args, slot) + column"),
    Mutation("segments of all blocks together", "int64_t(args.block_size) * before", "before", spec="segmented"),
    Mutation("segmented entries", "before + place * width", "before + place * 128", spec="segmented"),
    Mutation("segments of another width", "cache_part(args, slot, 96, 32)", "cache_part(args, slot, 96, 16)", spec="segmented"),
    Mutation("segments before the first", "cache_part(args, slot, 0, 96)", "cache_part(args, slot, 32, 96)", spec="segmented"),
    Mutation("one entry for all KV heads", " + head * args.kv_head_stride", "", spec="KV heads"),
    Mutation("one latent for all KV heads", " + head * args.kv_c_head_stride", "", spec="KV heads"),
    Mutation("one rotary part for all KV heads", " + head * args.k_pe_head_stride", "", spec="KV heads"),
    Mutation("KV heads as many as heads", "heads = args.kv_heads;", "heads = args.kv_heads - 1;", spec="KV heads"),
    Mutation("a scale for half a group", "LANES / 2; distance > 0", "LANES / 4; distance > 0", spec="fp8_ds_mla"),
    Mutation("a scale for the row", "group_scale<8>", "group_scale<16>", spec="fp8_ds_mla"),
    Mutation("a scale that is no power of two", "(bits + 0x7fffff) & 0xff800000", "bits", spec="fp8_ds_mla"),
    Mutation("a scale rounded down", "(bits + 0x7fffff) & 0xff800000", "bits & 0xff800000", spec="fp8_ds_mla"),
    Mutation("the scale of the other flavour", "largest / 224.0f", "largest / 448.0f", spec="fp8_ds_mla"),
    Mutation("positive values alone", "x[i] < 0.0f ? -x[i] : x[i]", "x[i]", spec="fp8_ds_mla"),
    Mutation("NaN in a scale", "magnitude > largest", "!(magnitude <= largest)", spec="fp8_ds_mla"),
    Mutation("codes by the scale", "1.0f / scale;\n    if (slot", "scale;\n    if (slot", spec="fp8_ds_mla"),
    Mutation("scales side by side", "column / 128 * 4", "column / 128", spec="fp8_ds_mla"),
    Mutation("scales elsewhere", "args, slot) + 256 + column", "args, slot) + 252 + column", spec="fp8_ds_mla"),
    Mutation("scales of one group only", "if (column % 128 == 0)", "if (column == 0)", spec="fp8_ds_mla"),
    Mutation("rotary bytes elsewhere", "(cache_entry(args, slot) + 264)", "(cache_entry(args, slot) + 256)", spec="fp8_ds_mla"),
    Mutation("slot 0 without codes", "if (slot < 0 || row", "if (slot <= 0 || row", spec="fp8_ds_mla"),
    # rows
    Mutation("head and token exchanged", "token = row / heads, head = row % heads", "token = row % heads, head = row / heads"),
    Mutation("last row forgotten", "if (row >= uint32_t(args.tokens)) return;", "if (row + 1 >= uint32_t(args.tokens)) return;"),
    Mutation("head stride forgotten", " + head * args.q_pe_head_stride", ""),
    Mutation("piece copied short", "copy<16>(q_out_row", "copy<8>(q_out_row", spec="same"),
    Mutation(
        "last entry forgotten", "(row >= uint32_t(args.tokens)) return;", "(row + 1 >= uint32_t(args.tokens)) return;", "cache only"
    ),
    Mutation("slot by token without a query", "load_index(args.slot_mapping, token, args.slots_int64)", "token", "cache only"),
    Mutation("tail guard dropped without a cache", "if (token < args.tokens) quantize", "quantize", "query only"),
    Mutation(
        "parts of a split query exchanged", "token * args.ql_nope_out_token_stride", "token * args.q_pe_out_token_stride", "split"
    ),
    Mutation(
        "head stride of a split query",
        "head * args.ql_nope_out_head_stride",
        "head * args.q_pe_out_head_stride",
        "split",
    ),
    # scales of rows
    Mutation("a wave's magnitude dropped", "if (l_first == 0) magnitudes", "if (l_first == 0 && wave != 1) magnitudes", "token"),
    Mutation("half of the lanes dropped", "largest_of_lanes<16, 64>", "largest_of_lanes<16, 32>", "token"),
    Mutation("other tokens' lanes taken, too", "largest_of_lanes<16, 64>", "largest_of_lanes<8, 64>", "token"),
    Mutation("one column of a lane dropped", "int i = 0; i < N; ++i) magnitude", "int i = 1; i < N; ++i) magnitude", "token"),
    Mutation("the rotary magnitude dropped", "[WAVES + piece] = magnitude", "[WAVES + piece] = 0.0f", "token"),
    Mutation("a rotary piece dropped", "[WAVES + piece] = magnitude", "[WAVES] = magnitude", "token"),
    Mutation(
        "the rotary magnitude of halves", "magnitude = larger(magnitude, high)", "magnitude = larger(magnitude, low)", "token, neox"
    ),
    Mutation("the magnitude before the rotation", "rotate<8>(x, cos, sin);\n}", "}", "token"),
    Mutation(
        "a pass dropped", "pass < PASSES; ++pass) magnitude", "pass < PASSES - 1; ++pass) magnitude", "token, passes", "sm_90"
    ),
    Mutation("a pass for all", "to + (pass * WAVES + wave) * L_TILE", "to + wave * L_TILE", "token, passes", "sm_90"),
    Mutation("weights of a pass for all", "l_tile = pass * WAVES + wave", "l_tile = wave", "token, passes", "sm_90"),
    Mutation("lanes of a row dropped", "largest_of_lanes<1, WAVE>", "largest_of_lanes<2, WAVE>", "token, absorbed"),
    Mutation("pieces of a row dropped", "piece < 6; piece += WAVE", "piece < 5; piece += WAVE", "token, absorbed"),
    Mutation("negative values have no magnitude", "x < 0.0f ? -x : x;", "x;", "token"),
    Mutation("a NaN is the largest", "other > magnitude ? other : magnitude", "magnitude >= other ? magnitude : other", "token"),
    Mutation("no barrier", "        barrier();\n", "", "token"),
    Mutation("scale of the other flavour", "magnitude / 240.0f", "magnitude / 448.0f", "token"),
    Mutation(
        "scale of a neighbour's row",
        "*to = row_scale(larger(0.0f, magnitudes[row]))",
        "*to = row_scale(larger(0.0f, magnitudes[0]))",
        "token",
    ),
    Mutation(
        "codes by a neighbour's scale",
        "1.0f / row_scale(larger(0.0f, magnitudes[row]))",
        "1.0f / row_scale(larger(0.0f, magnitudes[0]))",
        "token",
    ),
    Mutation("codes multiplied by the scale", "1.0f / row_scale", "row_scale", "token"),
    Mutation("scales of one head only", "args.q_scales_token_stride + head", "args.q_scales_token_stride", "token"),
    Mutation("scales by q_out's stride", "token * args.q_scales_token_stride", "token * args.heads", "token"),
    Mutation("a scale past the last token", "if (token < args.tokens) *to", "*to", "token"),
    Mutation("a row past the last token", "if (token < args.tokens) quantize", "quantize", "token"),
    Mutation("scale of one lane dropped", "if (lane == 0) args.q_scales", "if (lane == 1 && row) args.q_scales", "token, absorbed"),
    # conversions
    Mutation("saturation dropped", "saturate(x[i] * inverse_scale, limit)", "x[i] * inverse_scale"),
    Mutation("NaN not kept", "x < -limit ? -limit : x > limit ? limit : x", "std::max(-limit, std::min(limit, x))"),
    Mutation("wrong limit", "inverse_scale, 240.0f)", "inverse_scale, 224.0f)"),
    Mutation("scale not inverted", "1.0f / scale", "scale"),
    Mutation("scales exchanged", "*args.k_scale", "*args.q_scale"),
    Mutation("fp8 ties away from zero", "0x7ffff + (magnitude >> 20 & 1)", "0x80000", workload=UNIT_SCALES),
    Mutation("fp8 truncated", "magnitude + 0x7ffff + (magnitude >> 20 & 1)", "magnitude"),
    Mutation("fp8 bias of the other flavour", "e4m3_code<8, 0x7f, true>", "e4m3_code<7, 0x7e, false>"),
    Mutation("bf16 truncated", "(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "bits >> 16", spec="neox"),
    Mutation("fp16 truncated", "magnitude + 0xfff + (magnitude >> 13 & 1)", "magnitude", spec="fp16"),
    Mutation("rounding between steps dropped", "    round_to<bf16>(x);\n", "", spec="stepwise"),
    # absorb
    Mutation("tail guard dropped", "if (token < args.tokens) quantize", "quantize"),
    Mutation("head guard dropped", "    if (head >= args.heads) return;\n", ""),
    Mutation("heads by one XCD only", "* XCDS + workgroup % XCDS", "* XCDS"),
    Mutation("lane map of k", "k_first = lane / 16 * 8", "k_first = lane % 4 * 8", arch="gfx950"),
    Mutation("lane map of l", "l_first = lane / 16 * 8", "l_first = lane % 4 * 8"),
    Mutation("lane map of tokens", "token = tile * TOKEN_TILE + lane % 16", "token = tile * TOKEN_TILE + lane / 4"),
    Mutation("accumulator order", "sums[i / 4][i % 4]", "sums[i % 2][i / 2]"),
    Mutation("accumulators not cleared", "Accumulator sums[M_TILES] = {};", "static Accumulator sums[M_TILES];"),
    Mutation("latent tile forgotten", "l_tile * L_TILE + l_first", "l_first"),
    Mutation("fragments in another order", "chunk * M_TILES + m) * FRAGMENT", "m * CHUNKS + chunk) * FRAGMENT"),
    Mutation("q beyond P not zeroed", "k < NOPE_DIM ? load_fragment(row + k) : Fragment{}", "load_fragment(row + k)"),
    Mutation("last chunk of q forgotten", "k < NOPE_DIM ?", "k + CHUNK < NOPE_DIM ?", arch="gfx950"),
    # codes
    Mutation("codes of the first head", "args.w_uk + head * HEAD_BYTES", "args.w_uk", spec="fp8 weights"),
    Mutation("codes of the first tile", "(l_tile * LOADS * int32_t(WAVE)", "(0 * LOADS * int32_t(WAVE)", spec="fp8 weights"),
    Mutation("codes of the next load", "load_weights(packed + i *", "load_weights(packed + (i + 1) % LOADS *", spec="fp8 weights"),
    Mutation("sums without a scale", " * weight_scale;", ";", spec="fp8 weights"),
    Mutation(
        "halves of a fragment swapped",
        "[word % 4], codes[word / 4][word % 4 + 1]",
        "[word % 4 + 1], codes[word / 4][word % 4]",
        spec="fp8 weights",
    ),
    Mutation("codes in another order", "CODE_ORDER[] = {0, 1, 2, 3}", "CODE_ORDER[] = {0, 2, 1, 3}", spec="fp8 weights"),
    Mutation(
        "codes of the other flavour", "return e4m3_value<8, true>(code)", "return e4m3_value<7, false>(code)", spec="fp8 weights"
    ),
    Mutation("scales of the first rows", "scales[block * COLUMN_BLOCKS]", "scales[0]", spec="fp8-block"),
    Mutation("scales side by side for rows", "scales[block * COLUMN_BLOCKS]", "scales[block]", spec="fp8-block"),
    Mutation("scales of the first columns", " + l_tile / BLOCK_TILES", "", spec="fp8-block"),
    Mutation("scales of each tile", " + l_tile / BLOCK_TILES", " + l_tile", spec="fp8-block"),
    Mutation("blocks summed with one scale", "* weight_scales[block]", "* weight_scales[0]", spec="fp8-block"),
    Mutation("a block of rows twice", "chunk = block * BLOCK_CHUNKS;", "chunk = 0;", spec="fp8-block"),
    Mutation("high nibbles first", "{0, 4, 1, 5, 2, 6, 3, 7}", "{4, 0, 5, 1, 6, 2, 7, 3}", spec="mxfp4"),
    Mutation("nibbles of the other platform", "{0, 4, 1, 5, 2, 6, 3, 7}", "{0, 2, 4, 6, 1, 3, 5, 7}", spec="mxfp4"),
    Mutation("e2m1 without its sign", "code & 8 ? -magnitude : magnitude", "magnitude", spec="mxfp4"),
    Mutation("a scale off by one", ") - 253);", ") - 252);", spec="mxfp4"),
    Mutation(
        "the scale of the next chunk",
        "byte = (chunk * M_TILES + m) * ROWS",
        "byte = ((chunk + 1) % CHUNKS * M_TILES + m) * ROWS",
        spec="mxfp4",
    ),
    Mutation("one scale for both m tiles", "byte = (chunk * M_TILES + m) * ROWS", "byte = chunk * M_TILES * ROWS", spec="mxfp4"),
    Mutation("one row's scale for both", "* ROWS + row;", "* ROWS;", spec="mxfp4", arch="sm_90"),
    Mutation("scales of other lanes", "(lane % 16) * (EXPONENT_WORDS * 4)", "(lane / 16) * (EXPONENT_WORDS * 4)", spec="mxfp4"),
    Mutation("scales of the first tile", " + l_tile * TILE_EXPONENTS", "", spec="mxfp4"),
    Mutation("the head's factor forgotten", " * weight_scale;", ";", spec="mxfp4"),
    # activations in fp8
    Mutation("groups of the whole row", "GROUP_CHUNKS = 2;", "GROUP_CHUNKS = 4;", spec="a8"),
    Mutation("another group's scale", "* query_scales[group]", "* query_scales[0]", spec="a8"),
    Mutation("a magnitude of half the lanes", "lane ^ 32)));\n", "lane)));\n", spec="a8"),
    Mutation("a magnitude of positive values", "x < 0.0f ? -x : x", "x", spec="a8"),
    Mutation("halves of the query swapped", "q[chunk][word / 2][pair]", "q[chunk][1 - word / 2][pair]", spec="a8"),
    Mutation("no scale of the query", "part[m][i] * query_scales[group]", "part[m][i]", spec="a8"),
    Mutation("the scale of the first lanes", "(lane % 4 * 2 + column) * 4", "column * 4", spec="a8", arch="sm_90"),
    Mutation("the scale of another lane", "(lane % 4 * 2 + column) * 4", "lane % 4 * 2 + column", spec="a8", arch="sm_90"),
    Mutation("both tokens with one scale", "token_scales[i % 2]", "token_scales[0]", spec="a8", arch="sm_90"),
    Mutation("the tile before it is read", "quantize_query(arriving, q, query_scales);\n", "", spec="a8"),
    Mutation("all token tiles are the first", "token = tile * TOKEN_TILE + lane % 16", "token = lane % 16"),
)


def launch_for(kernel: Kernel, mutation: Mutation) -> Launch:
    return make_launch(kernel, mutation.workload, seed=1)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_defect_shows(mutation):
    spec = SPECS[mutation.spec]
    sound = load(spec, "cpu", arch=mutation.arch)
    assert not failures(sound, launch_for(sound, mutation)), "red without the mutation"
    kernel = build_kernel(spec, mutation.arch, sound.generated, (mutation.old, mutation.new))
    assert failures(kernel, launch_for(kernel, mutation)), "not seen"


def is_wrong(kernel: Kernel) -> bool:
    return bool(failures(kernel, make_launch(kernel, WORKLOAD)))


def test_32_bit_addresses_show(sparse):
    """A block stride beyond 2^32 elements, kept in 32 bits: what truncation would do in a large cache."""
    spec, stride = SPECS["gptj"], 2**32 + 128
    sound = load(spec, "cpu", arch="gfx942")
    change = ("block * args.block_stride", "int64_t(uint32_t(block * args.block_stride))")
    mutated = build_kernel(spec, "gfx942", sound.generated, change)
    workload = Workload(tokens=1, slots="first", block_size=1, bytes_cache=True)
    written = []
    for kernel in (sound, mutated):
        cache = sparse((2, 1, spec.entry_dim), (stride, spec.entry_dim, 1), torch.uint8)
        arguments = {**make_launch(kernel, workload).arguments, "kv_cache": cache, "slot_mapping": torch.tensor([1])}
        kernel(**arguments)
        written.append(bool(cache[1].any()))
    assert written == [True, False]


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((5, 3), (17, 3))],
    ids=["elements", "lanes", "lanes of other groups"],
)
def test_a_permuted_packing_shows(first, second, monkeypatch):
    def permuted(tiles):
        index = packing.packing_index(tiles).reshape(packing.packed_shape(tiles)).copy()
        swap = index[..., second[0], second[1]].copy()
        index[..., second[0], second[1]] = index[..., first[0], first[1]]
        index[..., first[0], first[1]] = swap
        return index.reshape(-1)

    kernel = load(SPECS["gptj"], "cpu", arch="gfx942")
    assert not is_wrong(kernel)
    monkeypatch.setattr(packed_weights, "packing_index", permuted)
    assert is_wrong(kernel)


def test_padding_of_the_weights_that_is_not_zero_shows():
    """Zeros of q meet the padding: NaN or infinities there would spoil every sum."""
    kernel = load(SPECS["gptj"], "cpu", arch="gfx942")
    launch = make_launch(kernel, WORKLOAD)
    index = torch.tensor(packing.packing_index(kernel.generated.schedule.absorb))
    packed = launch.arguments["packed"].view(3, -1)
    assert not packed[:, index == packing.PADDING].any()
    packed[:, index == packing.PADDING] = torch.nan
    assert failures(kernel, launch)


def body_for_other_map(spec: PrologueSpec, arch: str, **maps: FragmentMap) -> GeneratedKernel:
    """The host library of `arch`, with a kernel generated for an atom whose lane maps are others."""
    target = find_target(arch)
    atom = dataclasses.replace(target.atom(DType.BF16), **maps)
    other = dataclasses.replace(target, atoms=((DType.BF16, atom),))
    program = spec.program(other)
    lowered = lower(program)
    wrong = render(kernel_name(spec, target), program, lowered, choose_schedule(lowered, other), other)
    right = generate(spec, target)
    source = right.host_source.partition(MARK)[0] + MARK + wrong.host_source.partition(MARK)[2]
    assert source != right.host_source
    return dataclasses.replace(wrong, texts={"host": source}.__getitem__)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_another_lane_map_shows(arch):
    """The sums of a lane lie otherwise than the host library, like the hardware, has them: lanes / 4, not lanes % 16."""
    spec = SPECS["gptj"]
    d = FragmentMap((("m", 16), ("n", 16)), (Digit(4, "m", 4), Digit(16, "n", 1)), (Digit(4, "m", 1),))
    assert is_wrong(build_kernel(spec, arch, body_for_other_map(spec, arch, d=d)))
