"""What the tests of the host run share: launches with awkward layouts, kernels from changed text, and covering arrays.

Every input lies inside a larger buffer of NaN, every output between guard bytes: a kernel that reads or writes one element too far
shows it in its results.
"""

import itertools
import operator
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mlagen import toolchain, verify
from mlagen.cache_layout import cache_shape
from mlagen.codegen import GeneratedKernel
from mlagen.drivers.host import HostModule
from mlagen.guarded import Guarded
from mlagen.layout import Layout
from mlagen.plan import Module
from mlagen.runtime import Kernel, Variant
from mlagen.spec import PrologueSpec
from mlagen.tables import Range
from mlagen.target import find_target
from mlagen.torch_types import torch_dtype

MARGIN_ELEMENTS = 1 << 16
"""NaN elements before and after each input: no mutation of the tests reads further."""

OUT_OF_RANGE_SLOT = 1 << 40


def small_spec(**changes: Any) -> PrologueSpec:
    """A spec that compiles and runs quickly: P leaves half a chunk over, L needs two tiles."""
    options = {"heads": 3, "nope_dim": 48, "lora_rank": 96, "rope_dim": 32, "rope_style": "gptj"}
    return PrologueSpec(**{**options, **changes})


def embed(tensor: torch.Tensor, *, gap: int = 0, lead: int = 0) -> torch.Tensor:
    """A copy of `tensor` with `gap` elements after each row, `lead` elements off a 16-byte boundary, in a buffer of NaN.

    With gap and lead 0 the copy is contiguous.  Integers lie between values that are no valid index.
    """
    *rows, width = tensor.shape
    strides = [1]
    for extent in reversed([*rows[1:], width] if rows else []):
        strides.insert(0, strides[0] * extent + (gap if len(strides) == 1 else 0))
    extent = strides[0] * tensor.shape[0]
    filler = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    buffer = torch.full((2 * MARGIN_ELEMENTS + lead + extent,), filler, dtype=tensor.dtype, device=tensor.device)
    return buffer.as_strided(tensor.shape, strides, MARGIN_ELEMENTS + lead).copy_(tensor)


def transposed(tensor: torch.Tensor, **options: int) -> torch.Tensor:
    """`tensor` [T,H,:] with the memory order [H,T,:]."""
    return embed(tensor.transpose(0, 1), **options).transpose(0, 1)


@dataclass(frozen=True)
class Workload:
    """What one launch may vary without another kernel: counts, layouts, index types, slots, positions and scales."""

    tokens: int = 31
    block_size: int = 16
    cache: str = "padded"  # dense, padded: gaps after entries and blocks, interleaved: [block_size, blocks, :] in memory
    bytes_cache: bool = False  # an fp8 cache is handed over as uint8
    out: str = "spare heads"  # dense, spare heads, head major; none: the kernel allocates
    layout: str = "sliced"  # dense, sliced: odd strides and offsets, transposed: q_nope is [H,T,:], joined: one q, one kv
    k_pe_rank: int = 2
    slots: str = "some"  # some, none: all negative, first, last, all: every slot of the cache but for block padding
    slots_dtype: torch.dtype = torch.int64
    positions: str = "mixed"  # mixed, stale: most of them far outside the table
    positions_dtype: torch.dtype = torch.int64
    max_position: int = 300
    table: str = "joined"  # joined, pair
    table_dtype: str = "model"  # model, fp32
    scales: str = "given"  # given, none: both are 1
    special: bool = False  # NaN in some rows


@dataclass(frozen=True)
class Launch:
    """A case of mlagen.verify, with the arguments of the call that fills its outputs."""

    case: verify.Case
    arguments: dict[str, Any]


def make_launch(kernel: Kernel, workload: Workload, *, seed: int = 0) -> Launch:
    """Inputs and outputs of `workload` for `kernel`."""
    spec, target = kernel.spec, kernel.target
    inputs = dict(verify.make_case(spec, target, workload.tokens, seed=seed).inputs)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-workload.tokens // workload.block_size) + (workload.slots != "all")
    inputs["slot_mapping"] = _slots(workload, blocks * workload.block_size, generator)
    inputs["positions"] = _positions(workload, generator)
    table = torch.rand(workload.max_position, spec.rope_dim, generator=generator) * 2 - 1
    inputs["cos_sin_cache"] = table if workload.table_dtype == "fp32" else table.to(inputs["q_nope"].dtype)
    # Every binade from fp8's subnormals to beyond its largest value.
    for name in ("kv_c", "k_pe", "q_pe", "q_nope") if not spec.absorbs else ("kv_c", "k_pe", "q_pe"):
        spread = torch.randint(-6, 7, inputs[name].shape, generator=generator)
        inputs[name] = torch.ldexp(inputs[name], spread).to(inputs[name].dtype)
    if workload.special:
        for name in ("kv_c", "k_pe", "q_pe", "q_nope"):
            inputs[name][3::8, ..., 5::13] = torch.nan
    if workload.scales == "none":
        inputs["q_scale"] = inputs["k_scale"] = None
    q_out, q_second = [*(_query_output(kernel, workload, name) for name in spec.q_results), None, None][:2]
    case = verify.Case(inputs, q_out, _cache(kernel, workload, blocks) if spec.write_kv else None, q_second)
    return Launch(case, _arguments(kernel, case, workload))


def _slots(workload: Workload, capacity: int, generator: torch.Generator) -> torch.Tensor:
    tokens = workload.tokens
    if workload.slots == "none":
        slots = -1 - torch.arange(tokens) * 1000
    elif workload.slots == "first":
        slots = torch.arange(tokens)
    elif workload.slots == "last":
        slots = torch.arange(capacity - tokens, capacity)
    else:
        slots = torch.randperm(capacity, generator=generator)[:tokens]
        if workload.slots == "some":
            slots[:1] = 0
            slots[1:][slots[1:] == 0] = -1
            slots[3::7] = -1
    return slots.to(workload.slots_dtype)


def _positions(workload: Workload, generator: torch.Generator) -> torch.Tensor:
    last, limits = workload.max_position - 1, torch.iinfo(workload.positions_dtype)
    positions = torch.randint(0, last + 1, (workload.tokens,), generator=generator)
    edges = (0, last, last + 1, -1, last + 1000, -4)
    if workload.positions == "stale":
        edges += (limits.max, limits.min, limits.max - 1, limits.min + 1)
    step = 2 if workload.positions == "stale" else 7
    for number, at in enumerate(range(1, workload.tokens, step)):
        positions[at] = edges[number % len(edges)]
    return positions.to(workload.positions_dtype)


def _query_output(kernel: Kernel, workload: Workload, name: str) -> Guarded:
    spec, tokens, type_ = kernel.spec, workload.tokens, kernel.spec.program(kernel.target).verify()[name]
    heads = spec.heads + (3 if workload.out == "spare heads" else 0)
    if name == "q_scales":
        return Guarded((tokens, heads), (heads + 3, 1), torch.float32, kernel.device)
    width = type_.width
    row = width + (0 if workload.out == "dense" else 5 if name != "q_pe_out" else 9)
    strides = (row, tokens * row + 3, 1) if workload.out == "head major" else (heads * row, row, 1)
    return Guarded((tokens, heads, width), strides, torch_dtype(type_.dtype), kernel.device)


def _cache(kernel: Kernel, workload: Workload, blocks: int) -> Guarded:
    spec, size, width = kernel.spec, workload.block_size, kernel.spec.cache_width
    dtype = torch_dtype(spec.cache_dtype(kernel.target))
    if spec.kv_layout == "segmented":
        shape = cache_shape(spec, blocks, size)
        gap = {"dense": 0, "padded": 11, "interleaved": 16}[workload.cache]  # what is inside a block cannot be elsewhere
        return Guarded(shape, (shape[1] + gap, 1), dtype, kernel.device)
    head = width + (3 if workload.cache == "padded" else 0)
    entry = (head * spec.kv_heads if spec.kv_heads > 1 else width) + (7 if workload.cache == "padded" else 0)
    strides = (size * entry + (11 if workload.cache == "padded" else 0), entry)
    if workload.cache == "interleaved":
        strides = (entry, blocks * entry)
    return Guarded(cache_shape(spec, blocks, size), (*strides, *((head,) if spec.kv_heads > 1 else ()), 1), dtype, kernel.device)


def _arguments(kernel: Kernel, case: verify.Case, workload: Workload) -> dict[str, Any]:
    spec = kernel.spec
    inputs = {name: None if each is None else each.to(kernel.device) for name, each in case.inputs.items()}
    layout = {"gap": 3, "lead": 1} if workload.layout != "dense" else {}
    q: Any = (embed(inputs["q_nope"], **layout), embed(inputs["q_pe"], **layout) if spec.rope_dim else None)
    kv_c, k_pe = embed(inputs["kv_c"], **layout), embed(inputs["k_pe"], **layout)
    if workload.layout == "transposed":
        q = (transposed(inputs["q_nope"], **layout), q[1])
    elif workload.layout == "joined":
        q = embed(torch.cat((inputs["q_nope"], inputs["q_pe"]), -1), **layout)
        kv = embed(torch.cat((inputs["kv_c"], inputs["k_pe"]), -1), **layout)
        kv_c, k_pe = kv[..., : spec.lora_rank], kv[..., spec.lora_rank :]
    table: Any = inputs["cos_sin_cache"]
    half = spec.rope_dim // 2
    table = (embed(table[:, :half], gap=1), embed(table[:, half:], gap=2)) if workload.table == "pair" else embed(table, gap=3)
    # Slots of tokens that are not there: whoever reads them writes far outside, and says so.
    far = min(OUT_OF_RANGE_SLOT, torch.iinfo(workload.slots_dtype).max)
    beyond = torch.full((2,), far, dtype=workload.slots_dtype, device=kernel.device)
    arguments = {
        "q": q,
        "kv_c": kv_c,
        "k_pe": (k_pe.unsqueeze(1) if workload.k_pe_rank == 3 and spec.kv_heads == 1 else k_pe) if spec.rope_dim else None,
        "packed": embed(kernel.pack_weights(inputs["w_uk"], inputs.get("w_scale"))) if spec.absorbs else None,
        "kv_cache": case.kv_cache and case.kv_cache.tensor,
        "slot_mapping": torch.cat((inputs["slot_mapping"], beyond)),
        "positions": embed(inputs["positions"]) if spec.rope_style != "none" else None,
        "cos_sin_cache": table if spec.rope_style != "none" else None,
        "q_scale": inputs["q_scale"],
        "k_scale": inputs["k_scale"],
        "out": case.out,
    }
    if workload.bytes_cache and spec.write_kv and arguments["kv_cache"].dtype.itemsize == 1:
        arguments["kv_cache"] = arguments["kv_cache"].view(torch.uint8)
    unread = () if spec.write_q else ("q",)
    unread += () if spec.write_q and spec.q_scaling == "static" else ("q_scale",)
    unread += () if spec.write_kv else ("kv_c", "k_pe", "kv_cache", "slot_mapping", "k_scale")
    return arguments | dict.fromkeys(unread)


def failures(kernel: Kernel, launch: Launch) -> list[str]:
    """Run a launch; one line for each part of an output that the oracle does not explain."""
    out, given = kernel(**launch.arguments), launch.arguments["out"]
    assert out is given or all(map(operator.is_, out, given))
    return [verify.describe(part) for part in verify.compare_case(kernel.spec, kernel.target, launch.case) if not part.passed]


def check(kernel: Kernel, workload: Workload, *, seed: int = 0) -> None:
    """Fail unless `kernel` does `workload` right."""
    wrong = failures(kernel, make_launch(kernel, workload, seed=seed))
    assert not wrong, f"{kernel.generated.name}, {workload}: {'; '.join(wrong)}"


def build_kernel(spec: PrologueSpec, arch: str, generated: GeneratedKernel, *changes: tuple[str, str]) -> Kernel:
    """The kernel of `generated`, each (old, new) of `changes` replaced in its host source; `old` must be there."""
    source = generated.host_source
    for old, new in changes:
        assert old in source, f"not in the source of {generated.name}: {old}"
        source = source.replace(old, new)
    module = HostModule(toolchain.compile_host(source, name=generated.name))
    return single_kernel(spec, replace(generated, texts={"host": source}.__getitem__), module)


def single_kernel(
    spec: PrologueSpec,
    generated: GeneratedKernel,
    module: Module,
    unaligned: Callable[[], Module] | None = None,
    token_tiles: int | None = None,
) -> Kernel:
    """A kernel on the CPU that does any number of tokens with one module."""
    everything = Range(None, Layout(), token_tiles)
    variant = Variant(everything, generated, lambda: module, unaligned)
    return Kernel(spec, find_target(generated.arch), torch.device("cpu"), [variant])


def output_bytes(launch: Launch) -> torch.Tensor:
    """All bytes of both outputs, what lies around and between their rows included."""
    outputs = (*launch.case.queries, *([launch.case.kv_cache] if launch.case.kv_cache else []))
    storages = (guarded.tensor.untyped_storage() for guarded in outputs)
    return torch.cat([torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu() for storage in storages])


Row = dict[str, Any]


def covering(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Rows of one value for each factor, such that every allowed pair of values of two factors is in a row.

    Greedy and deterministic: each row starts from a pair that is still missing, and is the best of some random completions.
    """
    chooser = random.Random(0)
    missing = dict.fromkeys(_pairs({name: range(len(values)) for name, values in factors.items()}))
    rows: list[Row] = []
    while missing:
        fixed = dict(next(iter(missing)))
        candidates = (
            {name: fixed.get(name, chooser.randrange(len(values))) for name, values in factors.items()} for _ in range(4000)
        )
        legal = list(itertools.islice((each for each in candidates if allowed(_values(factors, each))), 40))
        if not legal:  # no row of its kind is allowed
            del missing[tuple(fixed.items())]
            continue
        best = max(legal, key=lambda each: sum(pair in missing for pair in _row_pairs(each)))
        for pair in _row_pairs(best):
            missing.pop(pair, None)
        rows.append(_values(factors, best))
    return rows


def _values(factors: Mapping[str, Sequence[Any]], indices: Mapping[str, int]) -> Row:
    return {name: factors[name][index] for name, index in indices.items()}


def _row_pairs(row: Mapping[str, int]) -> Iterable[tuple[tuple[str, int], tuple[str, int]]]:
    return itertools.combinations(row.items(), 2)


def _pairs(indices: Mapping[str, Iterable[int]]) -> Iterable[tuple[tuple[str, int], tuple[str, int]]]:
    for (one, ones), (two, twos) in itertools.combinations(indices.items(), 2):
        yield from (((one, a), (two, b)) for a, b in itertools.product(ones, twos))
