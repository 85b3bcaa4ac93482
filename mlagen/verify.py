"""verify: runs a kernel on random inputs and compares every byte with the oracle."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from mlagen.cache_layout import cache_shape, entries, values, written
from mlagen.dtypes import model_dtype
from mlagen.errors import VerificationError
from mlagen.guarded import Guarded
from mlagen.quantization import quantize_weights
from mlagen.reference import Bounded, evaluate
from mlagen.runtime import Kernel
from mlagen.spec import WEIGHT_CODES, PrologueSpec
from mlagen.target import Target
from mlagen.torch_types import torch_dtype

EXACT_SHARE = 0.99
"""Least share of fp8 codes that must equal the oracle's, where rounding allows neighbours."""

EXACT_SAMPLE = 1000
"""Elements from which on EXACT_SHARE is demanded: of a handful, one rounding tie is more than a hundredth."""

MAX_POSITION = 512
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Comparison:
    """One part of one output: how much of it equals the oracle's rounding, and the largest distance in value.

    `outside` counts elements that no rounding explains, `stray` bytes that were written where nothing belongs.  fp32 sums equal the
    oracle's by chance only: those that are `sums` must lie within the bounds, and no share of them must be exact.
    """

    name: str
    elements: int
    exact: int
    outside: int
    max_error: float
    stray: int
    must_be_exact: bool
    sums: bool = False

    @property
    def exact_share(self) -> float:
        return self.exact / self.elements if self.elements else 1.0

    @property
    def exact_percent(self) -> str:
        """The share in words, rounded down: 100.000 % is all of them, not all but one in a million."""
        thousandths = self.exact * 100_000 // self.elements if self.elements else 100_000
        return f"{thousandths / 1000:.3f} %"

    @property
    def passed(self) -> bool:
        share = 1.0 if self.must_be_exact else EXACT_SHARE if self.elements >= EXACT_SAMPLE and not self.sums else 0.0
        return not self.outside and not self.stray and self.exact_share >= share


@dataclass(frozen=True)
class Case:
    """Inputs of one launch, as the oracle wants them: w_uk unpacked, cos_sin_cache joined, the outputs between guard bytes.

    An output that the spec leaves out is None.  `q_out` and `q_second` are what a call returns.
    """

    inputs: dict[str, torch.Tensor]
    q_out: Guarded | None
    kv_cache: Guarded | None
    q_second: Guarded | None = None

    @property
    def queries(self) -> tuple[Guarded, ...]:
        """What the call returns, in the order of the spec's q_results."""
        return tuple(each for each in (self.q_out, self.q_second) if each)

    @property
    def out(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """What a call takes as `out`."""
        if self.q_out and self.q_second:
            return self.q_out.tensor, self.q_second.tensor
        return self.q_out.tensor if self.q_out else None


def make_case(spec: PrologueSpec, target: Target, tokens: int, *, seed: int = 0, device: torch.device | str = "cpu") -> Case:
    """Random inputs for `tokens` rows: some beyond fp8, some NaN, a cache with padded blocks, some slots -1, some stale positions.

    Inputs are drawn on the CPU, so that every device sees the same, and stay there; the outputs lie on `device`.
    """
    generator = torch.Generator().manual_seed(seed * 7919 + tokens)
    dtype = torch_dtype(model_dtype(spec.dtype))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def activation(*shape: int) -> torch.Tensor:
        x = draw(*shape)
        x[..., 3::61] *= 64  # beyond what fp8 holds
        x[4::9, ..., 5:6] = torch.nan
        return x.to(dtype)

    positions = torch.randint(0, MAX_POSITION, (tokens,), generator=generator)
    angles = torch.arange(MAX_POSITION)[:, None] / 10000 ** (torch.arange(0, spec.rope_dim, 2) / max(spec.rope_dim, 1))
    blocks = tokens // BLOCK_SIZE + 2
    slots = torch.randperm(blocks * BLOCK_SIZE, generator=generator)[:tokens]
    slots[slots == 0] = -1
    slots[:1] = 0
    slots[3::7] = -1
    positions[5::11] = MAX_POSITION + 1000
    positions[6::13] = -4
    inputs = {
        "q_nope": activation(tokens, spec.heads, spec.q_nope_dim),
        "q_pe": activation(tokens, spec.heads, spec.rope_dim),
        "kv_c": activation(tokens, *spec.kv_inner, spec.lora_rank),
        "k_pe": activation(tokens, *spec.kv_inner, spec.rope_dim),
        "cos_sin_cache": torch.cat((angles.cos(), angles.sin()), -1).to(dtype),
        "positions": positions,
        "slot_mapping": slots,
        "q_scale": torch.tensor(0.037),
        "k_scale": torch.tensor([0.0213]),
    }
    if spec.absorbs:
        inputs |= _weights(spec, target, (draw(spec.heads, spec.nope_dim, spec.lora_rank) / spec.nope_dim**0.5).to(dtype))
    types = spec.program(target).verify()
    rows = spec.heads + 1  # head room: heads that the kernel must leave alone
    queries: list[Guarded | None] = []
    for name in spec.q_results:
        shape = (tokens, rows, *types[name].widths)
        queries.append(Guarded(shape, _dense(shape), torch_dtype(types[name].dtype), device))
    q_out, q_second = [*queries, None, None][:2]
    kv_cache = None
    if spec.write_kv:
        shape = cache_shape(spec, blocks, BLOCK_SIZE)
        block, *inner = _dense(shape)
        kv_cache = Guarded(shape, (block + 64, *inner), torch_dtype(spec.cache_dtype(target)), device)
    return Case(inputs, q_out, kv_cache, q_second)


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[number + 1 :]) for number in range(len(shape)))


def _weights(spec: PrologueSpec, target: Target, w_uk: torch.Tensor) -> dict[str, torch.Tensor]:
    """W_UK as the spec has it, and its scales where it is made of codes: unlike ones, so that none can take another's place."""
    if spec.weight not in WEIGHT_CODES:
        return {"w_uk": w_uk}
    sizes = torch.arange(1, spec.heads + 1)[:, None, None] * torch.linspace(1, 9, spec.lora_rank)
    codes = quantize_weights((w_uk * sizes.to(w_uk.dtype)), spec, torch_dtype(target.fp8))
    by_head = torch.arange(1, spec.heads + 1) if spec.weight == "fp8" else torch.ones((), dtype=codes.scale.dtype)
    return {"w_uk": codes.w_uk, "w_scale": codes.scale * by_head}


def run_case(kernel: Kernel, case: Case) -> None:
    """Launch `kernel` on a case, writing its guarded outputs."""
    inputs = {name: tensor.to(kernel.device) for name, tensor in case.inputs.items()}
    packed = kernel.pack_weights(inputs["w_uk"], inputs.get("w_scale")) if kernel.spec.absorbs else None
    q_scale = inputs["q_scale"] if kernel.spec.q_scaling == "static" else None
    cache = case.kv_cache.tensor if case.kv_cache else None
    kernel(
        (inputs["q_nope"], inputs["q_pe"]), inputs["kv_c"], inputs["k_pe"], packed, cache, inputs["slot_mapping"],
        inputs["positions"], inputs["cos_sin_cache"], q_scale=q_scale, k_scale=inputs["k_scale"], out=case.out,
    )  # fmt: skip


def compare_case(spec: PrologueSpec, target: Target, case: Case) -> list[Comparison]:
    """What a launch left in the case's outputs against the oracle."""
    expected = evaluate(spec.program(target), case.inputs)
    outputs: dict[str, torch.Tensor] = {}
    strays: dict[str, int] = {}
    for name, guarded in zip(spec.q_results, case.queries, strict=True):
        mine = torch.zeros(guarded.tensor.shape, dtype=torch.bool)
        mine[:, : spec.heads] = True
        outputs[name], strays[name] = guarded.tensor.cpu()[:, : spec.heads], guarded.stray_bytes(mine)
    if case.kv_cache:
        slots, cache = case.inputs["slot_mapping"], case.kv_cache.tensor.cpu()
        kept = slots >= 0
        outputs["kv_entry"] = values(spec, target, entries(spec, cache, slots[kept]))
        strays["kv_entry"] = case.kv_cache.stray_bytes(written(spec, cache, slots[kept]))
        expected["kv_entry"] = expected_entries(spec, expected).map(lambda end: end[kept])
    return compare_outputs(spec, expected, outputs, strays)


def expected_entries(spec: PrologueSpec, expected: Mapping[str, Bounded]) -> Bounded:
    """The rows that the cache should get, of the oracle's values: [T, L+R], and as cache_layout.values() has them for bytes."""
    if spec.kv_layout != "fp8_ds_mla":
        return expected["kv_entry"]
    held = [expected[name] for name in ("kv_codes", "kv_scales", "kv_pe") if name in expected]
    return Bounded(*(torch.cat([getattr(each, end).double() for each in held], -1) for end in ("low", "exact", "high")))


def compare_outputs(
    spec: PrologueSpec,
    expected: Mapping[str, Bounded],
    outputs: Mapping[str, torch.Tensor],
    strays: Mapping[str, int] = MappingProxyType({}),
) -> list[Comparison]:
    """What a kernel wrote against the oracle's values, part by part, on their device, both by name.

    The names are those of spec.q_results, for tensors [T,H,:], and "kv_entry", for cache entries [kept,L+R]; those of fp8_ds_mla
    come as numbers, as expected_entries() and cache_layout.values() have them.  The strays are counts of bytes that it wrote
    elsewhere.
    """
    nope, pe = spec.nope_columns, spec.rope_columns
    verbatim = spec.rope_style == "none"
    parts: list[tuple[str, str, slice, bool]] = []
    if spec.q_scaling == "token":
        certain = not spec.absorbs and (verbatim or not spec.rope_dim)  # the scale, and with it every code of the row
        parts += [("q_out nope", "q_out", nope, certain), ("q_out pe", "q_out", pe, certain)]
        parts += [("q_scales", "q_scales", slice(None), certain)]
    elif spec.q_split:
        parts += [("ql_nope_out", "ql_nope_out", slice(None), not spec.absorbs), ("q_pe_out", "q_pe_out", slice(None), verbatim)]
    elif spec.write_q:
        parts += [("q_out nope", "q_out", nope, not spec.absorbs), ("q_out pe", "q_out", pe, verbatim)]
    if spec.write_kv:
        parts.append(("kv_cache nope", "kv_entry", nope, True))
        if spec.scale_groups:
            parts.append(("kv_cache scales", "kv_entry", slice(nope.stop, nope.stop + spec.scale_groups), True))
        parts.append(("kv_cache pe", "kv_entry", slice(pe.start + spec.scale_groups, pe.stop + spec.scale_groups), verbatim))
    comparisons, counted = [], set()
    for name, output, columns, must_be_exact in parts:
        if name.endswith(" pe") and not spec.rope_dim:
            continue
        stray = 0 if output in counted else strays.get(output, 0)  # with the first part of each output
        counted.add(output)
        compared = _compare(name, expected[output], outputs[output], columns, stray, must_be_exact=must_be_exact)
        comparisons.append(replace(compared, sums=output == "q_scales"))
    return comparisons


def _compare(name: str, expected: Bounded, actual: torch.Tensor, columns: slice, stray: int, *, must_be_exact: bool) -> Comparison:
    low, exact, high = (end[..., columns].double() for end in (expected.low, expected.exact, expected.high))
    got = actual[..., columns].double()
    both_nan = exact.isnan() & got.isnan()
    equal = (got == exact) | both_nan
    inside = equal | ((got >= low) & (got <= high))
    error = torch.where(equal, torch.zeros_like(got), (got - exact).abs())
    largest = float(error.nan_to_num(nan=float("inf")).max()) if error.numel() else 0.0
    return Comparison(name, got.numel(), int(equal.sum()), int((~inside).sum()), largest, stray, must_be_exact)


def verify(kernel: Kernel, tokens: Iterable[int], *, seed: int = 0) -> Iterator[tuple[int, list[Comparison]]]:
    """For each number of tokens: run the kernel on random inputs and compare.  Yields results as they come."""
    for count in tokens:
        case = make_case(kernel.spec, kernel.target, count, seed=seed, device=kernel.device)
        run_case(kernel, case)
        yield count, compare_case(kernel.spec, kernel.target, case)


def require(kernel: Kernel, tokens: Iterable[int], *, seed: int = 0) -> None:
    """Raise VerificationError, naming the first output that the oracle does not explain."""
    for count, comparisons in verify(kernel, tokens, seed=seed):
        for part in comparisons:
            if not part.passed:
                raise VerificationError(f"{kernel.generated.name}, {count} tokens: {describe(part)}")


def describe(part: Comparison) -> str:
    """One line on a comparison."""
    text = f"{part.name}: {part.exact_percent} of {part.elements} exact, max error {part.max_error:.3g}"
    if part.outside:
        text += f", {part.outside} elements that rounding does not explain"
    if part.stray:
        text += f", {part.stray} bytes written outside the output"
    return text
