"""The prologue as torch operators, for graphs: importing this module registers them.

    torch.ops.mlagen.decode_prologue(q, q_pe?, kv_c, k_pe?, packed?, kv_cache, slot_mapping, positions?, cos_sin_cache?, sin?,
                                     q_scale?, k_scale?, *, spec, arch="", q_heads=None) -> q_out
    torch.ops.mlagen.pack_weights(w_uk, scale=None, *, spec, arch="") -> packed

They do what Kernel's methods do, and take the same tensors; a pair is two arguments: q is q_nope where q_pe is given, and
cos_sin_cache is cos where sin is given.  What a graph adds:

- `spec` is spec_to_str(PrologueSpec(...)): a constant, equal for equal specs.  `arch` is needed on the CPU, whose tensors do not
  say whose program to run; empty, it means the architecture of the tensors' GPU, and a given one must be it.
- q_out is a new contiguous tensor [T, q_heads or H, L+R] for the T = q.shape[0] rows of q, every one of them, whatever
  slot_mapping says.  Heads from H on are zero.  Nothing but kv_cache is written.
- The operators are for inference: an input that requires grad is an ArgumentError where gradients are recorded.

A kernel is loaded when its operator first runs on a device; mlagen.load(spec, device) beforehand keeps that, and a compile, out of
the first request and out of a graph capture.
"""

import dataclasses
import functools
import types
import typing

import torch

from mlagen.arguments import Checker
from mlagen.codegen import generate
from mlagen.codes import packed_head_shape
from mlagen.errors import ArgumentError, SpecError, TargetError
from mlagen.runtime import Kernel, device_arch, load
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS, Target, find_target
from mlagen.torch_types import torch_dtype

DECODE_PROLOGUE = (
    "decode_prologue(Tensor q, Tensor? q_pe, Tensor kv_c, Tensor? k_pe, Tensor? packed, Tensor(a!) kv_cache, Tensor slot_mapping, "
    "Tensor? positions=None, Tensor? cos_sin_cache=None, Tensor? sin=None, Tensor? q_scale=None, Tensor? k_scale=None, *, "
    'str spec, str arch="", int? q_heads=None) -> Tensor'
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


# What runs.

_KERNELS: dict[tuple[str, str, torch.device], Kernel] = {}
"""The kernels that ran, by the arguments that choose them: the hot call parses no spec."""


def _kernel(spec: str, arch: str, device: torch.device) -> Kernel:
    try:
        return _KERNELS[spec, arch, device]
    except KeyError:
        kernel = _KERNELS[spec, arch, device] = load(spec_from_str(spec), device, arch=arch or None)
        return kernel


def _decode_prologue(
    q: torch.Tensor, q_pe: MaybeTensor, kv_c: torch.Tensor, k_pe: MaybeTensor, packed: MaybeTensor, kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor, positions: MaybeTensor = None, cos_sin_cache: MaybeTensor = None, sin: MaybeTensor = None,
    q_scale: MaybeTensor = None, k_scale: MaybeTensor = None, *, spec: str, arch: str = "", q_heads: int | None = None,
) -> torch.Tensor:  # fmt: skip
    if torch.is_grad_enabled():
        _refuse_grad(q, q_pe, kv_c, k_pe, packed, kv_cache, cos_sin_cache, sin, q_scale, k_scale)
    kernel = _kernel(spec, arch, kv_cache.device)
    heads = kernel.spec.heads
    out = None
    if q_heads is not None and q_heads != heads and q.dim():
        shape = (q.shape[0], _room(q_heads, heads), kernel.spec.entry_dim)
        out = torch.empty(shape, dtype=_out_dtype(kernel.spec, kernel.target), device=kernel.device)
    q_out = kernel(
        q if q_pe is None else (q, q_pe), kv_c, k_pe, packed, kv_cache, slot_mapping, positions,
        cos_sin_cache if sin is None else (typing.cast(torch.Tensor, cos_sin_cache), sin),
        q_scale=q_scale, k_scale=k_scale, out=out,
    )  # fmt: skip
    if out is not None:
        out[:, heads:].zero_()
    if not kv_cache.is_inference():
        torch.autograd.graph.increment_version(kv_cache)  # an operator of torch's own that writes a tensor does so too
    return q_out


def _pack_weights(w_uk: torch.Tensor, scale: MaybeTensor = None, *, spec: str, arch: str = "") -> torch.Tensor:
    if torch.is_grad_enabled():
        _refuse_grad(w_uk, scale, names=("w_uk", "scale"))
    return _kernel(spec, arch, w_uk.device).pack_weights(w_uk, scale)


_FLOATS = ("q", "q_pe", "kv_c", "k_pe", "packed", "kv_cache", "cos_sin_cache", "sin", "q_scale", "k_scale")


def _refuse_grad(*tensors: MaybeTensor, names: tuple[str, ...] = _FLOATS) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise ArgumentError(
                f"{name}: requires grad, and mlagen's operators have no derivative: "
                "call them under torch.no_grad() or torch.inference_mode(), or detach it"
            )


def _room(q_heads: int, heads: int) -> int:
    """The heads of q_out.  Raises ArgumentError where the spec's do not fit."""
    if q_heads < heads:
        raise ArgumentError(f"q_heads: {q_heads}, expected None or at least the spec's {heads}")
    return q_heads


def _out_dtype(spec: PrologueSpec, target: Target) -> torch.dtype:
    return torch_dtype(spec.output_dtype(spec.q_dtype, target))


# What runs on tensors without data: the same checks, where a number of rows may be a symbol, and the same result.


@functools.cache
def _expected(spec: str, arch: str, device: torch.device) -> tuple[Checker, tuple[int, ...]]:
    """The checks of a kernel's arguments and the shape of a packed head, without loading the kernel."""
    parsed = spec_from_str(spec)
    target = find_target(arch or _arch_of(device))
    generated = generate(parsed, target)
    tiles = generated.schedule.absorb
    return Checker(parsed, target, device), packed_head_shape(tiles, generated.codes) if tiles else ()


def _arch_of(device: torch.device) -> str:
    if device.type != "cuda":
        raise TargetError(f"arch: on device {device} it must be given: one of {', '.join(TARGETS)}")
    if not torch.cuda.is_available():
        raise TargetError(f"arch: torch sees no GPU to ask, so it must be given: one of {', '.join(TARGETS)}")
    return device_arch(torch.cuda.current_device() if device.index is None else device.index)


def _fake_decode_prologue(
    q: torch.Tensor, q_pe: MaybeTensor, kv_c: torch.Tensor, k_pe: MaybeTensor, packed: MaybeTensor, kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor, positions: MaybeTensor = None, cos_sin_cache: MaybeTensor = None, sin: MaybeTensor = None,
    q_scale: MaybeTensor = None, k_scale: MaybeTensor = None, *, spec: str, arch: str = "", q_heads: int | None = None,
) -> torch.Tensor:  # fmt: skip
    if torch.is_grad_enabled():
        _refuse_grad(q, q_pe, kv_c, k_pe, packed, kv_cache, cos_sin_cache, sin, q_scale, k_scale)
    checker, packed_head = _expected(spec, arch, kv_cache.device)
    heads, wanted = checker.spec.heads, checker.spec
    given = heads if q_heads is None else _room(q_heads, heads)
    model = (checker.model,)
    if q_pe is None:
        checker.tensor("q", q, (None, heads, wanted.q_nope_dim + wanted.rope_dim), model)
    else:
        checker.tensor("q[0] (q_nope)", q, (None, heads, wanted.q_nope_dim), model)
    tokens = q.shape[0]
    known = tokens if isinstance(tokens, int) else None  # a symbol is compared, not asked for its value
    if q_pe is not None:
        _match(tokens, "q[1] (q_pe)", checker.tensor("q[1] (q_pe)", q_pe, (known, heads, wanted.rope_dim), model))
    _match(tokens, "kv_c", checker.tensor("kv_c", kv_c, (known, *wanted.kv_inner, wanted.lora_rank), model))
    checker.cache(kv_cache)
    _pin_place(kv_cache)
    _check_indices(checker, tokens, "slot_mapping", slot_mapping, spare=True)
    if wanted.rope_dim:
        between = (1,) if wanted.kv_heads == 1 and k_pe is not None and k_pe.dim() == 3 else wanted.kv_inner
        _match(tokens, "k_pe", checker.tensor("k_pe", k_pe, (known, *between, wanted.rope_dim), model))
    if wanted.absorbs:
        checker.packed(packed, packed_head)
    else:
        checker.no_weights(packed)
    if wanted.rope_style != "none":
        checker.rotary(cos_sin_cache if sin is None else (cos_sin_cache, sin))
        _check_indices(checker, tokens, "positions", positions)
    for name, scale in (("q_scale", q_scale), ("k_scale", k_scale)):
        if scale is not None:
            checker.scale(name, scale)
    return q.new_empty((tokens, given, wanted.entry_dim), dtype=_out_dtype(wanted, checker.target))


def _check_indices(checker: Checker, tokens: int | torch.SymInt, name: str, value: MaybeTensor, *, spare: bool = False) -> None:
    """An index vector with an element for each token; with `spare`, with more at the end."""
    if isinstance(tokens, int):
        checker.indices(name, value, f">={tokens}" if spare else tokens)
    elif value is None or value.dim() != 1:
        checker.tensor(name, value, (None,), ())
    else:  # a vector of a plain length in its place: the check of its stride would ask for a symbol's value
        checker.indices(name, value.new_empty_strided((2,), value.stride()), 2)
        _match(tokens, name, value, spare=spare)


def _match(tokens: int | torch.SymInt, name: str, value: torch.Tensor, *, spare: bool = False) -> None:
    """As many rows as q has, where that is a symbol; a graph keeps the condition as a guard or as an assertion."""
    if not isinstance(tokens, int):
        rows = value.shape[0]
        torch._check_with(
            ArgumentError, rows >= tokens if spare else rows == tokens, lambda: f"{name}: {rows} rows, expected q's {tokens}"
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
    checker, packed_head = _expected(spec, arch, w_uk.device)
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
        (DECODE_PROLOGUE, _decode_prologue, _fake_decode_prologue),
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
