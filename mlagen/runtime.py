"""The runtime: from a spec and a device to a callable kernel."""

import functools
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mlagen.abi import block_format
from mlagen.arguments import WIDE_BYTES, Checker, bind
from mlagen.binaries import BundlePath, device_binary, host_library
from mlagen.codegen import GeneratedKernel, generate
from mlagen.errors import ArgumentError, MlagenError, TargetError
from mlagen.packing import PADDING, packed_shape, packing_index
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS, Target, find_target

MAX_WORK_ITEMS = 2**31 - 1
"""Lanes that a launch may have: they are numbered in 32 bits."""

MAX_PLANS = 4096
"""Argument signatures that one kernel remembers; with more, it starts over."""


class Module(Protocol):
    """What a driver gives: one loaded kernel."""

    def launch(self, grid: int, block: int, arguments: bytes) -> None:
        """Run `grid` workgroups of `block` lanes on the caller's current stream, with a packed argument block."""


@dataclass(frozen=True)
class Plan:
    """A launch with everything decided but the addresses: `holes` are (place among the values, tensor of the call, byte offset).

    Zero `tokens` launch nothing.  `wide` are the places of addresses that a kernel for aligned rows wants to be aligned, and
    `aligned` says that the strides are.
    """

    tokens: int
    grid: int
    values: list[int]
    holes: tuple[tuple[int, int, int], ...]
    wide: tuple[int, ...]
    aligned: bool


class Kernel:
    """A compiled prologue, ready to run.  Made by load(); safe to call from several threads."""

    def __init__(
        self,
        spec: PrologueSpec,
        target: Target,
        device: torch.device,
        generated: GeneratedKernel,
        module: Module,
        load_unaligned: Callable[[], Module] | None = None,
    ) -> None:
        """`load_unaligned` gives the kernel for rows that are not aligned, where `module` needs them to be."""
        self.spec, self.target, self.device, self.generated = spec, target, device, generated
        self._module = module
        self._load_unaligned = functools.cache(load_unaligned) if load_unaligned else None
        self._checker = Checker(spec, target, device)
        self.unit_scale = torch.ones((), device=device)  # of a call without a scale
        if type(self.unit_scale) is not torch.Tensor:
            raise MlagenError(f"load: a tensor made here is a {type(self.unit_scale).__name__}: load kernels outside of fake modes")
        self._pack = struct.Struct(block_format(generated.arguments)).pack
        tiles = generated.schedule.absorb
        self._packed_shape: Sequence[int] = packed_shape(tiles) if tiles else ()
        self._threads = generated.schedule.threads
        self._out_dtype = self._checker.fp8 if spec.q_dtype == "fp8" else self._checker.model
        self._plans: dict[Any, Plan] = {}

    def pack_weights(self, w_uk: torch.Tensor) -> torch.Tensor:
        """W_UK [H,P,L] of any strides in the order in which this kernel's lanes read it, to be done once at load.

        Returns a contiguous tensor of the same type with H as its first dimension.  Raises ArgumentError for a wrong shape, dtype
        or device, and for a kernel without absorb.
        """
        tiles = self.generated.schedule.absorb
        if tiles is None:
            raise ArgumentError("w_uk: this kernel does no absorb (weight='none'), there is nothing to pack")
        weights = self._checker.weights(w_uk)
        index = torch.tensor(packing_index(tiles), device=self.device)
        packed = weights.reshape(self.spec.heads, -1)[:, index.clamp(min=0)]
        if tiles.padded:
            packed[:, index == PADDING] = 0
        return packed.reshape(self.spec.heads, *self._packed_shape)

    def __call__(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None],
        kv_c: torch.Tensor,
        k_pe: torch.Tensor | None,
        packed: torch.Tensor | None,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        positions: torch.Tensor | None = None,
        cos_sin_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        q_scale: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the prologue: returns q_out [T, H' >= H, L+R] (`out` where given) and writes kv_cache at slot_mapping.

        q [T,H,P+R] or the pair q_nope [T,H,P], q_pe [T,H,R]; kv_c [T,L]; k_pe [T,R] or [T,1,R]: the model's dtype, unit last
        stride, other strides free.  packed: what pack_weights gave, None where weight="none".  kv_cache [blocks, block_size, L+R]:
        the model's dtype, the arch's fp8, or uint8 seen as that.  slot_mapping [>= T], positions [T]: int64 or int32; a negative
        slot leaves the cache alone, a position is clamped to the table.  cos_sin_cache [max_position, R] = [cos | sin], or the pair
        (cos, sin) [max_position, R/2] each: the model's dtype or fp32.  q_scale, k_scale: fp32, 0-dim or [1], on the device,
        value = code * scale; None is 1; not read where the output is not fp8.  positions and cos_sin_cache are not read, and may
        be None, where rope_style is "none"; k_pe may be None where rope_dim is 0.

        On a GPU the launch goes to the caller's current stream and returns at once; nothing is allocated when `out` is given.
        Raises ArgumentError, naming the argument, what it was and what it may be, before anything is launched.
        """
        q_pair, cos_sin_pair = isinstance(q, tuple | list), isinstance(cos_sin_cache, tuple | list)
        q0, q1 = self._checker.pair("q", "(q_nope, q_pe)", q) if q_pair else (q, None)
        cos, sin = self._checker.pair("cos_sin_cache", "(cos, sin)", cos_sin_cache) if cos_sin_pair else (cos_sin_cache, None)
        if out is None and isinstance(q0, torch.Tensor) and q0.dim():
            out = torch.empty((q0.shape[0], self.spec.heads, self.spec.entry_dim), dtype=self._out_dtype, device=self.device)
        if self.spec.rope_style == "none":
            positions = cos = sin = None  # not read, whatever they are
        if not self.spec.rope_dim:
            k_pe = None
        q_scale = self.unit_scale if q_scale is None else q_scale
        k_scale = self.unit_scale if k_scale is None else k_scale
        tensors: tuple[Any, ...] = (q0, q1, kv_c, k_pe, packed, kv_cache, slot_mapping, positions, cos, sin, q_scale, k_scale, out)
        try:
            # What the checks look at: a call whose tensors look like an earlier one's needs no second look.
            looks = [None if each is None else (each.shape, each.stride(), each.dtype, each.device) for each in tensors]
            plan = self._plans[tuple(looks), q_pair, cos_sin_pair]
        except (KeyError, AttributeError):
            plan = self._remember(tensors, q_pair, cos_sin_pair)
        if plan.tokens:
            if packed is not None and packed.data_ptr() % WIDE_BYTES:
                raise ArgumentError(
                    f"packed: starts off a multiple of {WIDE_BYTES} bytes: pass what pack_weights returned, or a clone"
                )
            if self.device.type == "cpu":
                self._check_slots(slot_mapping[: plan.tokens], kv_cache)
            values = plan.values.copy()
            for place, number, offset in plan.holes:
                values[place] = tensors[number].data_ptr() + offset
            module = self._module
            if self._load_unaligned and not (plan.aligned and all(values[place] % WIDE_BYTES == 0 for place in plan.wide)):
                module = self._load_unaligned()
            module.launch(plan.grid, self._threads, self._pack(*values))
        assert out is not None, "a call without tensors does not get this far"
        return out

    def _remember(self, tensors: Sequence[Any], q_pair: bool, cos_sin_pair: bool) -> Plan:
        """Check the tensors of a call, and keep its plan for all calls whose tensors look the same.  Raises ArgumentError."""
        plan = self._plan(tensors, q_pair, cos_sin_pair)
        looks = [None if each is None else (each.shape, each.stride(), each.dtype, each.device) for each in tensors]
        if len(self._plans) >= MAX_PLANS:
            self._plans = {}
        self._plans[tuple(looks), q_pair, cos_sin_pair] = plan
        return plan

    def _plan(self, tensors: Sequence[Any], q_pair: bool, cos_sin_pair: bool) -> Plan:
        """The launch for tensors like these.  Raises ArgumentError."""
        bound = bind(self._checker, self._packed_shape, tensors, q_pair=q_pair, cos_sin_pair=cos_sin_pair)
        launch = self.generated.schedule.launch(self.generated.lowered.segments, bound.tokens, self.spec.heads)
        if launch.grid * self._threads > MAX_WORK_ITEMS:
            raise ArgumentError(f"q: {bound.tokens} tokens are too many for one launch, call it for parts of the batch")
        numbers = {**bound.values, **launch.values}
        names = [argument.name for argument in self.generated.arguments]
        holes = tuple((place, *bound.pointers[name]) for place, name in enumerate(names) if name in bound.pointers)
        wide = tuple(place for place, name in enumerate(names) if name in bound.wide)
        return Plan(bound.tokens, launch.grid, [numbers.get(name, 0) for name in names], holes, wide, bound.aligned)

    def _check_slots(self, slots: torch.Tensor, kv_cache: torch.Tensor) -> None:
        """On the CPU a slot outside the cache is found before it is written; a GPU launch cannot look without waiting."""
        capacity, largest = kv_cache.shape[0] * kv_cache.shape[1], int(slots.max())
        if largest >= capacity:
            raise ArgumentError(f"slot_mapping: slot {largest}, but kv_cache {list(kv_cache.shape)} has slots 0 to {capacity - 1}")


_KERNELS: dict[tuple[PrologueSpec, str, torch.device], Kernel] = {}
_LOADING = threading.Lock()


def load(spec: PrologueSpec, device: str | torch.device, *, arch: str | None = None, bundle: BundlePath | None = None) -> Kernel:
    """The kernel of `spec` for `device`: from this process, a bundle, the disk cache or the compiler, in this order.

    device "cuda" is torch's name for a GPU, an AMD one on torch's ROCm build; its architecture is asked for, and `arch`, where
    given, must be it.  device "cpu" runs the program of `arch` on the CPU, faithfully, lane by lane: the way to test what will run
    on that GPU.  `bundle` is a folder that `mlagen build` wrote, or several; MLAGEN_BUNDLE_PATH names more.  MLAGEN_JIT=0 forbids
    the compiler.

    Raises TargetError for an unknown arch or device, SpecError, ToolchainError, BuildError, MissingKernelError where MLAGEN_JIT=0
    and nothing is built.
    """
    if not isinstance(spec, PrologueSpec):
        raise ArgumentError(f"spec: expected a PrologueSpec, got {type(spec).__name__}")
    where, target = _resolve(device, arch)
    key = (spec, target.arch, where)
    found = _KERNELS.get(key)
    if found is not None:
        return found
    if where.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise MlagenError("load: the current stream is being captured: load kernels before the capture")
    generated = generate(spec, target)
    with _LOADING:
        if key not in _KERNELS:
            load_unaligned = None
            if where.type != "cpu" and not target.unaligned_access:
                load_unaligned = functools.partial(_load_variant, spec, target, where, bundle, False)
            module = _load_variant(spec, target, where, bundle, True)
            _KERNELS[key] = Kernel(spec, target, where, generated, module, load_unaligned)
        return _KERNELS[key]


def _resolve(device: str | torch.device, arch: str | None) -> tuple[torch.device, Target]:
    """The device with its index, and the target that runs there."""
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        raise TargetError(f"device={device!r}: expected 'cpu', 'cuda' or 'cuda:N'") from None
    if where.type == "cpu":
        if arch is None:
            raise TargetError(f"arch: the host run needs to know whose program to run: one of {', '.join(TARGETS)}")
        return where, find_target(arch)
    if where.type != "cuda":
        raise TargetError(f"device={str(device)!r}: expected 'cpu', 'cuda' or 'cuda:N'")
    if not torch.cuda.is_available():
        raise TargetError(f"device={str(device)!r}: torch {torch.__version__} sees no GPU; `mlagen doctor` says what is missing")
    index = torch.cuda.current_device() if where.index is None else where.index
    if index >= torch.cuda.device_count():
        raise TargetError(f"device={str(device)!r}: torch sees {torch.cuda.device_count()} GPUs, numbered from 0")
    actual = device_arch(index)
    target = find_target(actual)
    if arch is not None and find_target(arch) is not target:
        raise TargetError(f"arch={arch!r}: cuda:{index} is a {actual}; leave arch out, or name another device")
    return torch.device("cuda", index), target


def device_arch(index: int) -> str:
    """Architecture of GPU number `index`, as the compiler names it."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _load_variant(spec: PrologueSpec, target: Target, device: torch.device, bundle: BundlePath | None, aligned: bool) -> Module:
    """The kernel for aligned rows, or for any, found or compiled, in the device's driver."""
    generated = generate(spec, target, aligned=aligned)
    if device.type == "cpu":
        from mlagen.drivers.host import HostModule

        return HostModule(host_library(spec, generated), [argument.kind for argument in generated.arguments])
    return open_module(device_binary(spec, generated, target, bundle), generated.name, target, device)


def open_module(binary: bytes, kernel: str, target: Target, device: torch.device) -> Module:
    """`kernel` of a code object or cubin for `target`, loaded on a GPU.  Raises as the target's driver does."""
    if target.platform == "nvidia":
        from mlagen.drivers.cuda import CudaModule

        return CudaModule(binary, kernel, device.index)
    from mlagen.drivers.hip import HipModule

    return HipModule(binary, kernel, device.index)
