"""The runtime: from a spec and a device to a callable kernel."""

import functools
import threading
from collections.abc import Sequence

import torch

from mlagen import toolchain
from mlagen.arguments import Bound, Checker, bind
from mlagen.codegen import GeneratedKernel, generate
from mlagen.drivers.host import HostModule
from mlagen.errors import ArgumentError, TargetError
from mlagen.packing import PADDING, packed_shape, packing_index
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS, Target, find_target

MAX_WORK_ITEMS = 2**31 - 1
"""Lanes of one segment that a launch may need: lanes are numbered in 32 bits."""


class Kernel:
    """A compiled prologue, ready to run.  Made by load(); safe to call from several threads."""

    def __init__(self, spec: PrologueSpec, target: Target, generated: GeneratedKernel, module: HostModule) -> None:
        self.spec, self.target, self.generated = spec, target, generated
        self.device = torch.device("cpu")
        self._module = module
        self._checker = Checker(spec, target, self.device)
        self._kinds = tuple(argument.kind for argument in generated.arguments)
        self._names = tuple(argument.name for argument in generated.arguments)
        tiles = generated.schedule.absorb
        self._packed_shape: Sequence[int] = packed_shape(tiles) if tiles else ()

    def pack_weights(self, w_uk: torch.Tensor) -> torch.Tensor:
        """W_UK [H,P,L] of any strides in the order in which this kernel's lanes read it, to be done once at load.

        Returns a contiguous tensor of the same type with H as its first dimension.  Raises ArgumentError for a wrong shape, dtype
        or device, and for a kernel without absorb.
        """
        spec, tiles = self.spec, self.generated.schedule.absorb
        if tiles is None:
            raise ArgumentError("w_uk: this kernel does no absorb (weight='none'), there is nothing to pack")
        if not isinstance(w_uk, torch.Tensor):
            raise ArgumentError(
                f"w_uk: expected a tensor [{spec.heads}, {spec.nope_dim}, {spec.lora_rank}], got {type(w_uk).__name__}"
            )
        shape = (spec.heads, spec.nope_dim, spec.lora_rank)
        if tuple(w_uk.shape) != shape:
            raise ArgumentError(
                f"w_uk: shape {list(w_uk.shape)}, expected {list(shape)} as [H, P, L]; transpose it with .mT if need be"
            )
        if w_uk.dtype != self._checker.model:
            raise ArgumentError(f"w_uk: dtype {w_uk.dtype}, expected {self._checker.model}")
        if w_uk.device != self.device:
            raise ArgumentError(f"w_uk: on device {w_uk.device}, this kernel runs on {self.device}")
        index = torch.from_numpy(packing_index(tiles)).to(self.device)
        packed = w_uk.reshape(spec.heads, -1)[:, index.clamp(min=0)]
        packed[:, index == PADDING] = 0
        return packed.reshape(spec.heads, *self._packed_shape)

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

        Raises ArgumentError, naming the argument, what it was and what it may be, before anything is launched.
        """
        bound = bind(
            self._checker, self._packed_shape, q, kv_c, k_pe, packed, kv_cache, slot_mapping, positions, cos_sin_cache,
            q_scale, k_scale, out,
        )  # fmt: skip
        if bound.tokens:
            self._check_slots(slot_mapping[: bound.tokens], kv_cache)
            self._launch(bound)
        return bound.out

    def _check_slots(self, slots: torch.Tensor, kv_cache: torch.Tensor) -> None:
        """On the CPU a slot outside the cache is found before it is written; a GPU launch cannot look without waiting."""
        capacity, largest = kv_cache.shape[0] * kv_cache.shape[1], int(slots.max())
        if largest >= capacity:
            raise ArgumentError(f"slot_mapping: slot {largest}, but kv_cache {list(kv_cache.shape)} has slots 0 to {capacity - 1}")

    def _launch(self, bound: Bound) -> None:
        schedule = self.generated.schedule
        launch = schedule.launch(self.generated.lowered.segments, bound.tokens, self.spec.heads)
        if launch.grid * schedule.threads > MAX_WORK_ITEMS:
            raise ArgumentError(f"q: {bound.tokens} tokens are too many for one launch, call it for parts of the batch")
        values = {**bound.values, "token_tiles_per_workgroup": launch.token_tiles_per_workgroup}
        self._module.launch(launch.grid, self._kinds, [values[name] for name in self._names])


_LOADING = threading.Lock()


def load(spec: PrologueSpec, device: str | torch.device = "cpu", *, arch: str | None = None) -> Kernel:
    """The kernel of `spec` for `device`, compiled on the first call of the process.

    device "cpu" runs the program of `arch` (one of mlagen.TARGETS) on the CPU, faithfully, lane by lane: the way to test what will
    run on that GPU.  Raises TargetError for an unknown arch or device, SpecError, ToolchainError, BuildError.
    """
    if torch.device(device).type != "cpu":
        raise TargetError(
            f"device={str(device)!r}: only 'cpu' runs yet; the code objects that `mlagen build` writes run on the GPU"
        )
    if arch is None:
        raise TargetError(f"arch: the host run needs to know whose program to run: one of {', '.join(TARGETS)}")
    if not isinstance(spec, PrologueSpec):
        raise TargetError(f"spec: expected a PrologueSpec, got {type(spec).__name__}")
    target = find_target(arch)
    generated = generate(spec, target)
    with _LOADING:
        module = _host_module(generated.name, generated.host_source)
    return Kernel(spec, target, generated, module)


@functools.cache
def _host_module(name: str, source: str) -> HostModule:
    return HostModule(toolchain.compile_host(source, name=name))
