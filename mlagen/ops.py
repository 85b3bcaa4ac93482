"""The prologue as torch operators, for graphs: importing this module registers them.

    torch.ops.mlagen.decode_prologue(q, q_pe?, kv_c, k_pe?, packed?, kv_cache, slot_mapping, positions?, cos_sin_cache?, sin?,
                                     q_scale?, k_scale?, *, spec, arch="", q_heads=None) -> q_out
    torch.ops.mlagen.decode_prologue_q(q, q_pe?, packed?, positions?, cos_sin_cache?, sin?, q_scale?, *, spec, arch="",
                                       q_heads=None) -> q_out
    torch.ops.mlagen.decode_prologue_pair(q, q_pe?, kv_c?, k_pe?, packed?, kv_cache?, slot_mapping?, positions?, cos_sin_cache?,
                                          sin?, q_scale?, k_scale?, *, spec, arch="", q_heads=None) -> a pair
    torch.ops.mlagen.decode_prologue_kv(kv_c, k_pe?, kv_cache, slot_mapping, positions?, cos_sin_cache?, sin?, k_scale?, *, spec,
                                        arch="") -> ()
    torch.ops.mlagen.pack_weights(w_uk, scale=None, *, spec, arch="") -> packed

They do what Kernel's methods do, and take the same tensors; a pair is two arguments: q is q_nope where q_pe is given, and
cos_sin_cache is cos where sin is given.  decode_prologue_q is for a spec with write_kv=False, decode_prologue_kv for one with
write_q=False, and decode_prologue_pair for one whose query is a pair, with or without a cache.  What a graph adds:

- `spec` is spec_to_str(PrologueSpec(...)): a constant, equal for equal specs.  `arch` is needed on the CPU, whose tensors do not
  say whose program to run; empty, it means the architecture of the tensors' GPU, and a given one must be it.
- q_out is a new contiguous tensor [T, q_heads or H, L+R] for the T = q.shape[0] rows of q, every one of them, whatever
  slot_mapping says; each of a pair is one, of its own width.  Heads from H on are zero.  Nothing but kv_cache is written, and by
  decode_prologue_q nothing at all.
- The operators are for inference: an input that requires grad is an ArgumentError where gradients are recorded.

A kernel is loaded when its operator first runs on a device; mlagen.load(spec, device) beforehand keeps that, and a compile, out of
the first request and out of a graph capture.
"""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable

import torch

from mlagen.arguments import Checker
from mlagen.codegen import generate
from mlagen.codes import packed_head_shape
from mlagen.errors import ArgumentError, SpecError, TargetError
from mlagen.runtime import Kernel, device_arch, load
from mlagen.spec import PrologueSpec
from mlagen.tables import base_layout
from mlagen.target import TARGETS, find_target

DECODE_PROLOGUE = (
    "decode_prologue(Tensor q, Tensor? q_pe, Tensor kv_c, Tensor? k_pe, Tensor? packed, Tensor(a!) kv_cache, Tensor slot_mapping, "
    "Tensor? positions=None, Tensor? cos_sin_cache=None, Tensor? sin=None, Tensor? q_scale=None, Tensor? k_scale=None, *, "
    'str spec, str arch="", int? q_heads=None) -> Tensor'
)
DECODE_PROLOGUE_Q = (
    "decode_prologue_q(Tensor q, Tensor? q_pe, Tensor? packed, Tensor? positions=None, Tensor? cos_sin_cache=None, "
    'Tensor? sin=None, Tensor? q_scale=None, *, str spec, str arch="", int? q_heads=None) -> Tensor'
)
DECODE_PROLOGUE_PAIR = (
    "decode_prologue_pair(Tensor q, Tensor? q_pe, Tensor? kv_c, Tensor? k_pe, Tensor? packed, Tensor(a!)? kv_cache, "
    "Tensor? slot_mapping, Tensor? positions=None, Tensor? cos_sin_cache=None, Tensor? sin=None, Tensor? q_scale=None, "
    'Tensor? k_scale=None, *, str spec, str arch="", int? q_heads=None) -> (Tensor, Tensor)'
)
DECODE_PROLOGUE_KV = (
    "decode_prologue_kv(Tensor kv_c, Tensor? k_pe, Tensor(a!) kv_cache, Tensor slot_mapping, Tensor? positions=None, "
    'Tensor? cos_sin_cache=None, Tensor? sin=None, Tensor? k_scale=None, *, str spec, str arch="") -> ()'
)
PACK_WEIGHTS = 'pack_weights(Tensor w_uk, Tensor? scale=None, *, str spec, str arch="") -> Tensor'

MaybeTensor = torch.Tensor | None


def spec_to_str(spec: PrologueSpec) -> str:
    """The canonical text of a spec, such as "heads=16,nope_dim=128,...": equal specs give equal texts.

    Every field that is not None, in the order of the class: a later version's defaults do not change what a stored graph means.
    """
    values = ((field.name, getattr(spec, field.name)) for field in dataclasses.fields(spec))
    return ",".join(f"{name}={value}" for name, value in values if value is not None)


@functools.cache
def spec_from_str(text: str) -> PrologueSpec:
    """The spec that spec_to_str wrote as `text`; a field that is left out has its default.  Raises SpecError."""
    kinds = {field: _kind(annotation) for field, annotation in typing.get_type_hints(PrologueSpec).items()}
    values: dict[str, typing.Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in kinds or name in values:
            raise SpecError(f"spec={text!r}: {part!r} is not one of {', '.join(f'{field}=...' for field in kinds)}, each once")
        try:
            values[name] = _TRUTHS[value] if kinds[name] is bool else kinds[name](value)
        except (ValueError, KeyError):
            raise SpecError(f"spec={text!r}: {part!r} is not {kinds[name].__name__}") from None
    required = [field.name for field in dataclasses.fields(PrologueSpec) if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise SpecError(f"spec={text!r}: {', '.join(missing)} missing; write it with mlagen.ops.spec_to_str")
    return PrologueSpec(**values)


_TRUTHS = {"True": True, "False": False}
"""A bool's constructor takes any text for true."""


def _kind(annotation: object) -> type:
    """The type of a field's values, without the None of an optional one; its constructor reads their text, but for bool."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (each for each in typing.get_args(annotation) if each is not types.NoneType)
    assert annotation in (int, float, str, bool), f"a spec's field of type {annotation} needs a reader"
    return typing.cast(type, annotation)


def operator_of(spec: PrologueSpec) -> str:
    """The name of the operator that calls the kernels of a spec."""
    if not spec.write_q:
        return "decode_prologue_kv"
    if len(spec.q_results) == 2:
        return "decode_prologue_pair"
    return "decode_prologue" if spec.write_kv else "decode_prologue_q"


# What runs.

_KERNELS: dict[tuple[str, str, str, torch.device], Kernel] = {}
"""The kernels that ran, by the operator and the arguments that choose them: the hot call parses no spec."""


def _kernel(operator: str, spec: str, arch: str, device: torch.device) -> Kernel:
    try:
        return _KERNELS[operator, spec, arch, device]
    except KeyError:
        kernel = load(_spec_for(operator, spec), device, arch=arch or None)
        _KERNELS[operator, spec, arch, device] = kernel
        return kernel


def _spec_for(operator: str, text: str) -> PrologueSpec:
    """The spec, which must be one for this operator.  Raises SpecError."""
    spec = spec_from_str(text)
    if operator not in (operator_of(spec), "pack_weights"):
        raise SpecError(f"spec={text!r}: its kernel is called by torch.ops.mlagen.{operator_of(spec)}, not by {operator}")
    return spec


def _decode_prologue(
    q: torch.Tensor, q_pe: MaybeTensor, kv_c: torch.Tensor, k_pe: MaybeTensor, packed: MaybeTensor, kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor, positions: MaybeTensor = None, cos_sin_cache: MaybeTensor = None, sin: MaybeTensor = None,
    q_scale: MaybeTensor = None, k_scale: MaybeTensor = None, *, spec: str, arch: str = "", q_heads: int | None = None,
) -> torch.Tensor:  # fmt: skip
    if torch.is_grad_enabled():
        _refuse_grad(q, q_pe, kv_c, k_pe, packed, kv_cache, cos_sin_cache, sin, q_scale, k_scale)
    kernel = _kernel("decode_prologue", spec, arch, kv_cache.device)
    out = None if q_heads is None else _roomy("decode_prologue", q, q_heads, spec, arch)
    q_out: torch.Tensor = kernel(
        q if q_pe is None else (q, q_pe), kv_c, k_pe, packed, kv_cache, slot_mapping, positions,
        cos_sin_cache if sin is None else (typing.cast(torch.Tensor, cos_sin_cache), sin),
        q_scale=q_scale, k_scale=k_scale, out=out[0] if out else None,
    )  # fmt: skip
    _clear_room(kernel, out)
    _count_write(kv_cache)
    return q_out


def _decode_prologue_pair(
    q: torch.Tensor, q_pe: MaybeTensor, kv_c: MaybeTensor, k_pe: MaybeTensor, packed: MaybeTensor, kv_cache: MaybeTensor,
    slot_mapping: MaybeTensor, positions: MaybeTensor = None, cos_sin_cache: MaybeTensor = None, sin: MaybeTensor = None,
    q_scale: MaybeTensor = None, k_scale: MaybeTensor = None, *, spec: str, arch: str = "", q_heads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if torch.is_grad_enabled():
        _refuse_grad(q, q_pe, kv_c, k_pe, packed, kv_cache, cos_sin_cache, sin, q_scale, k_scale)
    kernel = _kernel("decode_prologue_pair", spec, arch, q.device)
    out = None if q_heads is None else _roomy("decode_prologue_pair", q, q_heads, spec, arch)
    pair: tuple[torch.Tensor, torch.Tensor] = kernel(
        q if q_pe is None else (q, q_pe), kv_c, k_pe, packed, kv_cache, slot_mapping, positions,
        cos_sin_cache if sin is None else (typing.cast(torch.Tensor, cos_sin_cache), sin),
        q_scale=q_scale, k_scale=k_scale, out=out,
    )  # fmt: skip
    _clear_room(kernel, out)
    if kv_cache is not None and kernel.spec.write_kv:
        _count_write(kv_cache)
    return pair


def _decode_prologue_q(
    q: torch.Tensor, q_pe: MaybeTensor, packed: MaybeTensor, positions: MaybeTensor = None, cos_sin_cache: MaybeTensor = None,
    sin: MaybeTensor = None, q_scale: MaybeTensor = None, *, spec: str, arch: str = "", q_heads: int | None = None,
) -> torch.Tensor:  # fmt: skip
    if torch.is_grad_enabled():
        _refuse_grad(q, q_pe, None, None, packed, None, cos_sin_cache, sin, q_scale, None)
    kernel = _kernel("decode_prologue_q", spec, arch, q.device)
    out = None if q_heads is None else _roomy("decode_prologue_q", q, q_heads, spec, arch)
    q_out: torch.Tensor = kernel(
        q if q_pe is None else (q, q_pe), None, None, packed, None, None, positions,
        cos_sin_cache if sin is None else (typing.cast(torch.Tensor, cos_sin_cache), sin),
        q_scale=q_scale, out=out[0] if out else None,
    )  # fmt: skip
    _clear_room(kernel, out)
    return q_out


def _decode_prologue_kv(
    kv_c: torch.Tensor, k_pe: MaybeTensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, positions: MaybeTensor = None,
    cos_sin_cache: MaybeTensor = None, sin: MaybeTensor = None, k_scale: MaybeTensor = None, *, spec: str, arch: str = "",
) -> None:  # fmt: skip
    if torch.is_grad_enabled():
        _refuse_grad(None, None, kv_c, k_pe, None, kv_cache, cos_sin_cache, sin, None, k_scale)
    _kernel("decode_prologue_kv", spec, arch, kv_cache.device)(
        None, kv_c, k_pe, None, kv_cache, slot_mapping, positions,
        cos_sin_cache if sin is None else (typing.cast(torch.Tensor, cos_sin_cache), sin), k_scale=k_scale,
    )  # fmt: skip
    _count_write(kv_cache)


def _roomy(operator: str, q: torch.Tensor, q_heads: int, spec: str, arch: str) -> tuple[torch.Tensor, ...] | None:
    """The results, where they are to have more heads than the spec; the kernel makes the others."""
    checker, _ = _expected(operator, spec, arch, q.device)
    if q_heads == checker.spec.heads or not q.dim():
        return None
    return _results(checker, q, q_heads)


def _results(checker: Checker, q: torch.Tensor, q_heads: int | None) -> tuple[torch.Tensor, ...]:
    """New tensors for what a call returns.  Raises ArgumentError where the spec's heads do not fit."""
    heads = checker.spec.heads
    if q_heads is not None and q_heads < heads:
        raise ArgumentError(f"q_heads: {q_heads}, expected None or at least the spec's {heads}")
    return tuple(checker.empty(name, q.shape[0], q_heads or heads) for name in checker.results)


def _clear_room(kernel: Kernel, out: tuple[torch.Tensor, ...] | None) -> None:
    for each in out or ():
        each[:, kernel.spec.heads :].zero_()


def _count_write(kv_cache: torch.Tensor) -> None:
    """An operator of torch's own that writes a tensor does so too."""
    if not kv_cache.is_inference():
        torch.autograd.graph.increment_version(kv_cache)


def _pack_weights(w_uk: torch.Tensor, scale: MaybeTensor = None, *, spec: str, arch: str = "") -> torch.Tensor:
    if torch.is_grad_enabled():
        _refuse_grad(w_uk, scale, names=("w_uk", "scale"))
    return _kernel("pack_weights", spec, arch, w_uk.device).pack_weights(w_uk, scale)


_FLOATS = ("q", "q_pe", "kv_c", "k_pe", "packed", "kv_cache", "cos_sin_cache", "sin", "q_scale", "k_scale")


def _refuse_grad(*tensors: MaybeTensor, names: tuple[str, ...] = _FLOATS) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise ArgumentError(
                f"{name}: requires grad, and mlagen's operators have no derivative: "
                "call them under torch.no_grad() or torch.inference_mode(), or detach it"
            )


# What runs on tensors without data: the same checks, where a number of rows may be a symbol, and the same result.


@functools.cache
def _expected(operator: str, spec: str, arch: str, device: torch.device) -> tuple[Checker, tuple[int, ...]]:
    """The checks of a kernel's arguments and the shape of a packed head, without loading the kernel."""
    parsed = _spec_for(operator, spec)
    target = find_target(arch or _arch_of(device))
    generated = generate(parsed, target, base_layout(parsed, target))
    tiles = generated.schedule.absorb
    return Checker(parsed, target, device), packed_head_shape(tiles, generated.codes) if tiles else ()


def _arch_of(device: torch.device) -> str:
    if device.type != "cuda":
        raise TargetError(f"arch: on device {device} it must be given: one of {', '.join(TARGETS)}")
    if not torch.cuda.is_available():
        raise TargetError(f"arch: torch sees no GPU to ask, so it must be given: one of {', '.join(TARGETS)}")
    return device_arch(torch.cuda.current_device() if device.index is None else device.index)


def _fake(operator: str, run: Callable[..., object]) -> Callable[..., object]:
    """What stands for `run` where tensors have no data, with its signature; what the operator does not take is None here."""
    signature = inspect.signature(run)

    def fake(*arguments: object, **options: object) -> object:
        call = signature.bind(*arguments, **options)
        call.apply_defaults()
        given: dict[str, typing.Any] = {**dict.fromkeys((*_FLOATS, "slot_mapping", "positions", "q_heads")), **call.arguments}
        if torch.is_grad_enabled():
            _refuse_grad(*map(given.__getitem__, _FLOATS))
        q, kv_cache = given["q"], given["kv_cache"]
        where = q if operator in ("decode_prologue_pair", "decode_prologue_q") else kv_cache
        checker, packed_head = _expected(operator, given["spec"], given["arch"], where.device)
        tokens = None
        if checker.spec.write_q:
            tokens = _check_query(checker, packed_head, q, given["q_pe"], given["packed"], given["q_scale"])
        if checker.spec.write_kv:
            entries = given["kv_c"], given["k_pe"], kv_cache, given["slot_mapping"], given["k_scale"]
            tokens = _check_entries(checker, tokens, *entries)
        assert tokens is not None, "something is written"
        _check_rotary(checker, tokens, given["positions"], given["cos_sin_cache"], given["sin"])
        results = _results(checker, q, given["q_heads"]) if checker.spec.write_q else ()
        return results[0] if len(results) == 1 else results or None

    return fake


Rows = int | torch.SymInt


def _check_query(
    checker: Checker, packed_head: tuple[int, ...], q: torch.Tensor, q_pe: MaybeTensor, packed: MaybeTensor, scale: MaybeTensor
) -> Rows:
    """What the query is made of; returns its rows."""
    wanted, model = checker.spec, (checker.model,)
    heads = wanted.heads
    if q_pe is None:
        checker.tensor("q", q, (None, heads, wanted.q_nope_dim + wanted.rope_dim), model)
    else:
        checker.tensor("q[0] (q_nope)", q, (None, heads, wanted.q_nope_dim), model)
    tokens = q.shape[0]
    if q_pe is not None:
        shape = (_known(tokens), heads, wanted.rope_dim)
        _match(tokens, "q[1] (q_pe)", checker.tensor("q[1] (q_pe)", q_pe, shape, model))
    if wanted.absorbs:
        checker.packed(packed, packed_head)
    else:
        checker.no_weights(packed)
    if wanted.q_scaling == "token":
        checker.no_scale(scale)
    elif scale is not None:
        checker.scale("q_scale", scale)
    return tokens


def _check_entries(
    checker: Checker, tokens: Rows | None, kv_c: MaybeTensor, k_pe: MaybeTensor, kv_cache: MaybeTensor, slot_mapping: MaybeTensor,
    scale: MaybeTensor,
) -> Rows:  # fmt: skip
    """What the cache's entries are made of, and where they go; returns their number."""
    wanted, model = checker.spec, (checker.model,)
    rows = None if tokens is None else _known(tokens)
    latent = checker.tensor("kv_c", kv_c, (rows, *wanted.kv_inner, wanted.lora_rank), model)
    if tokens is None:
        tokens = latent.shape[0]
    else:
        _match(tokens, "kv_c", latent)
    _pin_place(checker.cache(kv_cache))
    _check_indices(checker, tokens, "slot_mapping", slot_mapping, spare=True)
    if wanted.rope_dim:
        between = (1,) if wanted.kv_heads == 1 and k_pe is not None and k_pe.dim() == 3 else wanted.kv_inner
        _match(tokens, "k_pe", checker.tensor("k_pe", k_pe, (_known(tokens), *between, wanted.rope_dim), model))
    if scale is not None:
        checker.scale("k_scale", scale)
    return tokens


def _check_rotary(checker: Checker, tokens: Rows, positions: MaybeTensor, cos_sin_cache: MaybeTensor, sin: MaybeTensor) -> None:
    if checker.spec.rope_style != "none":
        checker.rotary(cos_sin_cache if sin is None else (cos_sin_cache, sin))
        _check_indices(checker, tokens, "positions", positions)


def _known(tokens: Rows) -> int | None:
    """A symbol is compared, not asked for its value."""
    return tokens if isinstance(tokens, int) else None


def _check_indices(checker: Checker, tokens: Rows, name: str, value: MaybeTensor, *, spare: bool = False) -> None:
    """An index vector with an element for each token; with `spare`, with more at the end."""
    if isinstance(tokens, int):
        checker.indices(name, value, f">={tokens}" if spare else tokens)
    elif value is None or value.dim() != 1:
        checker.tensor(name, value, (None,), ())
    else:  # a vector of a plain length in its place: the check of its stride would ask for a symbol's value
        checker.indices(name, value.new_empty_strided((2,), value.stride()), 2)
        _match(tokens, name, value, spare=spare)


def _match(tokens: Rows, name: str, value: torch.Tensor, *, spare: bool = False) -> None:
    """As many rows as the first tensor has, where that is a symbol; a graph keeps the condition as a guard or as an assertion."""
    if not isinstance(tokens, int):
        rows = value.shape[0]
        torch._check_with(
            ArgumentError,
            rows >= tokens if spare else rows == tokens,
            lambda: f"{name}: {rows} rows, expected {tokens}, one for each token",
        )


def _pin_place(kv_cache: torch.Tensor) -> None:
    """Make the place of the cache in its storage a number.

    Where it is a symbol, as for a view in a graph with dynamic extents, torch 2.13's Inductor would have the operator write to the
    start of the storage (pytorch#198068).  Fixing the cache's extents, which no server changes, avoids that.
    """
    if not isinstance(kv_cache.storage_offset(), int):
        for extent in (*kv_cache.shape, *kv_cache.stride()):
            int(extent)


def _fake_pack_weights(w_uk: torch.Tensor, scale: MaybeTensor = None, *, spec: str, arch: str = "") -> torch.Tensor:
    if torch.is_grad_enabled():
        _refuse_grad(w_uk, scale, names=("w_uk", "scale"))
    checker, packed_head = _expected("pack_weights", spec, arch, w_uk.device)
    if not checker.spec.absorbs:
        raise ArgumentError("w_uk: this kernel does no absorb (weight='none'), there is nothing to pack")
    checker.weight_scale(checker.weights(w_uk), scale)
    return w_uk.new_empty((checker.spec.heads, *packed_head), dtype=checker.packed_dtype)


def _register() -> object:
    """Define the operators; they live as long as what is returned.

    Not torch.library.custom_op: a call through its wrappers takes ten times as long.
    """
    library: typing.Any = torch.library  # parts of it have no types
    fragment = library.Library("mlagen", "FRAGMENT")
    # Inductor must hand over what the fakes saw: the kernel wants unit last strides.  torch 2.6 has no tag for exact strides.
    strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    for schema, run, fake in (
        (DECODE_PROLOGUE, _decode_prologue, _fake("decode_prologue", _decode_prologue)),
        (DECODE_PROLOGUE_Q, _decode_prologue_q, _fake("decode_prologue_q", _decode_prologue_q)),
        (DECODE_PROLOGUE_PAIR, _decode_prologue_pair, _fake("decode_prologue_pair", _decode_prologue_pair)),
        (DECODE_PROLOGUE_KV, _decode_prologue_kv, _fake("decode_prologue_kv", _decode_prologue_kv)),
        (PACK_WEIGHTS, _pack_weights, _fake_pack_weights),
    ):
        fragment.define(schema, tags=(torch.Tag.pt2_compliant_tag, strides))
        name = schema.partition("(")[0]
        for device in ("CPU", "CUDA"):  # CUDA is torch's name for a GPU, an AMD one too
            fragment.impl(name, run, device)
        library.register_fake(f"mlagen::{name}", fake, lib=fragment)
    return fragment


if not hasattr(torch.ops.mlagen, "decode_prologue"):  # a second import, or a reload, finds them there
    _LIBRARY = _register()
