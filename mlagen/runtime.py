"""The runtime: from a spec and a device to a callable kernel."""

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mlagen.arguments import TENSORS, Checker, bind
from mlagen.binaries import BundlePath, device_binary, host_library
from mlagen.cache_layout import slots_of_block
from mlagen.codegen import GeneratedKernel, generate
from mlagen.codes import packed_head_shape
from mlagen.errors import ArgumentError, MlagenError, TargetError
from mlagen.layout import Layout
from mlagen.packed_weights import pack_codes, pack_model_weights
from mlagen.plan import Form, Module, Plan
from mlagen.quantization import WeightCodes, quantize_weights
from mlagen.signature import matcher
from mlagen.spec import PrologueSpec
from mlagen.tables import Range, choose_ranges
from mlagen.target import TARGETS, Target, find_target

MAX_WORK_ITEMS = 2**31 - 1
"""Lanes that a launch may have: they are numbered in 32 bits."""

_PAIR = (tuple, list)

Made = TypeVar("Made")


@dataclass(frozen=True)
class Variant:
    """The kernel for a range of tokens.

    `module` gives it, loaded; `unaligned`, where that needs aligned rows, gives the one that does not.
    """

    range: Range
    generated: GeneratedKernel
    module: Callable[[], Module]
    unaligned: Callable[[], Module] | None = None


class Kernel:
    """A compiled prologue, ready to run.  Made by load(); safe to call from several threads."""

    def __init__(self, spec: PrologueSpec, target: Target, device: torch.device, variants: Sequence[Variant]) -> None:
        """`variants` by rising numbers of tokens; they all read the same packed weights."""
        self.spec, self.target, self.device, self.variants = spec, target, device, tuple(variants)
        self.generated = self.variants[0].generated
        self._checker = Checker(spec, target, device)
        # For a call without scales; two, since calls with one object in two places take longer to recognise.
        one = torch.ones((), dtype=torch.float32, device=device)  # whatever torch's default dtype is
        self.unit_scales = one, one.clone()
        if type(self.unit_scales[0]) is not torch.Tensor:
            found = type(self.unit_scales[0]).__name__
            raise MlagenError(f"load: a tensor made here is a {found}: load kernels outside of fake modes")
        self._wait()  # the first call may be on another stream
        tiles = self.generated.schedule.absorb
        self._packed_shape: Sequence[int] = packed_head_shape(tiles, self.generated.codes) if tiles else ()
        self._out_dtype = self._checker.fp8 if spec.q_dtype == "fp8" else self._checker.model
        self._absorbs, self._has_rope, self._rotates = spec.absorbs, spec.rope_dim > 0, spec.rope_style != "none"
        self._writes_q, self._returns_one = spec.write_q, len(spec.q_results) == 1
        self._computes_scales = spec.q_scaling == "token"
        self._checks_slots = device.type == "cpu" and spec.write_kv
        both = (False, True)
        self._forms = {(q_pair, table_pair): self._form(q_pair, table_pair) for q_pair in both for table_pair in both}

    def _form(self, q_pair: bool, table_pair: bool) -> Form:
        """Calls of this kernel with q, with the rotary tables, as a pair or as one tensor."""
        pairs = {"q_pe": not q_pair, "k_pe": not self._has_rope, "packed": not self._absorbs, "sin": not table_pair}
        unread = {name for name, is_unread in pairs.items() if is_unread}
        if not self._rotates:
            unread |= {"positions", "cos_sin_cache", "sin"}
        if not self.spec.write_q:
            unread |= {"q", "q_pe", "q_scale", "out"}
        if self.spec.q_scaling == "token":
            unread.add("q_scale")
        if len(self.spec.q_results) < 2:
            unread.add("out_second")
        if not self.spec.write_kv:
            unread |= {"kv_c", "k_pe", "kv_cache", "slot_mapping", "k_scale"}
        return Form([name for name in TENSORS if name not in unread])

    def pack_weights(self, w_uk: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """W_UK [H,P,L] of any strides in the order in which this kernel's lanes read it, to be done once at load.

        Returns a contiguous tensor with H as its first dimension: of the same type, or uint8 where the spec's weight is made of
        codes.  For these W_UK may come in the model's dtype, to be quantised as vLLM (fp8), DeepGEMM (fp8-block) and AITER (mxfp4)
        do, or as codes with their `scale`:

        - fp8: w_uk [H,P,L] in the arch's fp8; scale fp32, one for all ([] or [1]) or one for each head ([H]).
        - fp8-block: the same with scale [H, P/128, L/128], rounded up, or [H, P/k, L/128] with k = gcd(P, 128);
          mlagen.quantization.split_kv_b_proj gives both from a checkpoint's kv_b_proj.
        - mxfp4: w_uk uint8 [H, P/2, L], row 2i in the low nibble, and scale uint8 [H, P/32, L], a byte b meaning 2^(b - 127).
          AITER's w_k [H, L, P/2] and w_k_scale [H, L, P/32] are these with their last dimensions transposed (.mT).

        Codes are looked at, which waits for the device.  Raises ArgumentError for a wrong shape, dtype or device, for codes, scales
        or weights to quantise that are no numbers, and for a kernel without absorb.
        """
        tiles = self.generated.schedule.absorb
        if tiles is None:
            raise ArgumentError("w_uk: this kernel does no absorb (weight='none'), there is nothing to pack")
        weights = self._checker.weights(w_uk)
        scales = self._checker.weight_scale(weights, scale)
        if self.generated.codes is None:
            packed = pack_model_weights(weights, tiles)
        elif scales is None:
            packed = pack_codes(quantize_weights(weights, self.spec, self._checker.fp8), self.generated.codes)
        else:
            weights = weights.view(torch.uint8) if self.spec.weight == "mxfp4" else weights
            packed = pack_codes(WeightCodes(weights, scales), self.generated.codes)
        if self.generated.dependent:
            self._wait()  # these kernels read weights before the kernel before them has ended
        return packed

    def _wait(self) -> None:
        """Until what the current stream was given to do is done."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def __call__(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None] | None,
        kv_c: torch.Tensor | None,
        k_pe: torch.Tensor | None,
        packed: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        slot_mapping: torch.Tensor | None,
        positions: torch.Tensor | None = None,
        cos_sin_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        q_scale: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        out: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    ) -> Any:
        """Run the prologue: returns q_out [T, H' >= H, L+R] (`out` where given) and writes kv_cache at slot_mapping.

        q [T,H,P+R] or the pair q_nope [T,H,P], q_pe [T,H,R]; kv_c [T,L]; k_pe [T,R] or [T,1,R]: the model's dtype, unit last
        stride, other strides free.  packed: what pack_weights gave, None where weight="none".  kv_cache [blocks, block_size, L+R]:
        the model's dtype, the arch's fp8, or uint8 seen as that; with kv_layout="segmented" [blocks, block_size * (L+R)], a block
        the latent columns of its slots and then their rotary ones; with "fp8_ds_mla" uint8 [blocks, block_size, L + 4 * L/128 +
        2 * R].  With K > 1 KV heads: kv_c [T,K,L], k_pe [T,K,R], kv_cache [blocks, block_size, K, L+R].  slot_mapping [>= T],
        positions [T]: int64 or int32; a negative slot leaves the cache alone, a position is clamped to the table.  The rows of
        q_out and of the cache are [latent | rotary], or [rotary | latent] where the spec has nope_first=False.  cos_sin_cache
        [max_position, R] = [cos | sin], or the pair (cos, sin) [max_position, R/2] each: the model's dtype or fp32.  q_scale,
        k_scale: fp32, 0-dim or [1], on the device, value = code * scale; None is 1; not read where the output is not fp8, nor
        k_scale with fp8_ds_mla, whose scales are made here.  positions and cos_sin_cache are not read, and may be None, where
        rope_style is "none"; k_pe may be None where rope_dim is 0.

        With q_split=True the query is the pair ql_nope_out [T,H',L], q_pe_out [T,H',R], which `out` then takes, too.

        With q_scaling="token" it is the pair q_out, q_scales [T,H'] in fp32, value = code * scale, and q_scale must be None.  A
        row's scale is its largest magnitude over the fp8 limit, at least 2^-126, which rows of zeros have.  NaN counts for nothing
        there and stays NaN in q_out.  A row with an infinity has an infinite scale: its infinities become NaN, its other codes 0.

        What a spec leaves out is not read and may be None.  With write_kv=False these are kv_c, k_pe, kv_cache, slot_mapping and
        k_scale.  With write_q=False they are q and q_scale; packed and out must be None, T is the number of kv_c's rows, and the
        call returns None.

        On a GPU the launch goes to the caller's current stream and returns at once; nothing is allocated when `out` is given.
        Raises ArgumentError, naming the argument, what it was and what it may be, before anything is launched.
        """
        if packed is not None and not self._absorbs:
            self._checker.no_weights(packed)
        q0: object = q
        cos: object = cos_sin_cache
        q1 = sin = second = None
        q_pair = table_pair = False
        if not self._writes_q:
            self._checker.no_output(out)
        elif isinstance(q, _PAIR):
            q0, q1 = self._checker.pair("q", "(q_nope, q_pe)", q)
            q_pair = self._has_rope or q1 is not None  # without RoPE columns, (q, None) is q
        if not self._rotates:
            positions = cos = None  # not read, whatever they are
        elif isinstance(cos_sin_cache, _PAIR):
            cos, sin = self._checker.pair("cos_sin_cache", "(cos, sin)", cos_sin_cache)
            table_pair = True
        if not self._returns_one:
            if self._computes_scales:
                self._checker.no_scale(q_scale)
            first, second = self._outputs(q0, out)
        elif out is None and isinstance(q0, torch.Tensor) and q0.dim():
            first = torch.empty((q0.shape[0], self.spec.heads, self.spec.entry_dim), dtype=self._out_dtype, device=self.device)
        else:
            first = out
        if q_scale is None:
            q_scale = self.unit_scales[0]
        if k_scale is None:
            k_scale = self.unit_scales[1]
        tensors = (q0, q1, kv_c, k_pe, packed, kv_cache, slot_mapping, positions, cos, sin, q_scale, k_scale, first, second)
        form = self._forms[q_pair, table_pair]
        given = form.pick(tensors)
        plan = form.recent
        if plan is None or not plan.matches(*given):
            plan = form.find(given)
            if plan is None:
                plan = form.keep(given, self._plan(form, tensors, given, q_pair, table_pair))
        if plan.tokens:
            if self._checks_slots:
                assert slot_mapping is not None, "it was checked"
                assert kv_cache is not None, "it was checked"
                self._check_slots(slot_mapping[: plan.tokens], kv_cache)
            plan.run(given)
        if self._returns_one:
            return first
        return (first, second) if self._writes_q else None

    def _outputs(self, q: object, out: object) -> tuple[object, object]:
        """What a call writes to, where that is not one tensor: the members of `out`, new tensors, or nothing."""
        if not self._writes_q:
            return None, None
        if out is not None:
            return self._checker.output_pair(out)
        if not isinstance(q, torch.Tensor) or not q.dim():
            return None, None
        first, second = (self._checker.empty(name, q.shape[0], self.spec.heads) for name in self._checker.results)
        return first, second

    def _plan(self, form: Form, tensors: Sequence[Any], given: Sequence[Any], q_pair: bool, table_pair: bool) -> Plan:
        """The launch for tensors like these.  Raises ArgumentError."""
        bound = bind(self._checker, self._packed_shape, tensors, q_pair=q_pair, cos_sin_pair=table_pair)
        variant = next(each for each in self.variants if each.range.tokens is None or bound.tokens <= each.range.tokens)
        generated = variant.generated
        launch = generated.schedule.launch(
            generated.lowered.segments, bound.tokens, self.spec.heads, token_tiles=variant.range.token_tiles,
            kv_heads=self.spec.kv_heads,
        )  # fmt: skip
        threads = generated.schedule.threads
        if launch.grid * threads > MAX_WORK_ITEMS:
            name = "q" if self._writes_q else "kv_c"
            raise ArgumentError(f"{name}: {bound.tokens} tokens are too many for one launch, call it for parts of the batch")
        numbers = {**bound.values, **launch.values}
        matches = matcher(given)

        def plan(module: Module, elsewhere: Callable[[], Plan] | None = None) -> Plan:
            size = (launch, threads)
            return Plan(matches, bound, form.places, generated.arguments, numbers, module, size, elsewhere=elsewhere)

        unaligned = variant.unaligned
        if unaligned is None:
            return plan(variant.module())
        elsewhere = _once(lambda: plan(unaligned()))
        return plan(variant.module(), elsewhere) if bound.aligned or not bound.tokens else elsewhere()

    def _check_slots(self, slots: torch.Tensor, kv_cache: torch.Tensor) -> None:
        """On the CPU a slot outside the cache is found before it is written; a GPU launch cannot look without waiting."""
        capacity, largest = kv_cache.shape[0] * slots_of_block(self.spec, kv_cache.shape), int(slots.max())
        if largest >= capacity:
            raise ArgumentError(f"slot_mapping: slot {largest}, but kv_cache {list(kv_cache.shape)} has slots 0 to {capacity - 1}")


_Key = tuple[PrologueSpec, str, torch.device, bool]
_KERNELS: dict[_Key, Kernel] = {}
_LOADING: dict[_Key, threading.Lock] = {}
_lock = threading.Lock()  # of _LOADING


def load(
    spec: PrologueSpec,
    device: str | torch.device,
    *,
    arch: str | None = None,
    bundle: BundlePath | None = None,
    pdl: bool = False,
) -> Kernel:
    """The kernel of `spec` for `device`: from this process, a bundle, the disk cache or the compiler, in this order.

    device "cuda" is torch's name for a GPU, an AMD one on torch's ROCm build; its architecture is asked for, and `arch`, where
    given, must be it.  device "cpu" runs the program of `arch` on the CPU, faithfully, lane by lane: the way to test what will run
    on that GPU.  `bundle` is a folder that `mlagen build` wrote, or several; MLAGEN_BUNDLE_PATH names more.  MLAGEN_JIT=0 forbids
    the compiler.  Threads that load the same kernel get the same one, made once; others do not wait for each other.

    pdl=True is NVIDIA's programmatic dependent launch: a launch may start once every workgroup of the kernel before it in the
    stream has allowed it (these kernels do, early) or has ended; it asks for the weights, and waits with all else until that kernel
    has ended and what it wrote is seen.  So packed weights must be complete before: pack_weights of such a kernel waits for its
    stream, and whoever writes them in another way must wait as well.

    What was loaded stays: later changes of MLAGEN_TABLES, of a table or of `bundle` have no effect on a kernel of this process.

    Raises TargetError for an unknown arch or device, ScheduleError where the target has no dependent launch, SpecError,
    ToolchainError, BuildError, MissingKernelError where MLAGEN_JIT=0 and nothing is built.
    """
    if not isinstance(spec, PrologueSpec):
        raise ArgumentError(f"spec: expected a PrologueSpec, got {type(spec).__name__}")
    where, target = _resolve(device, arch)
    key = (spec, target.arch, where, bool(pdl))
    found = _KERNELS.get(key)
    if found is not None:
        return found
    if where.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise MlagenError("load: the current stream is being captured: load kernels before the capture")
    with _lock:
        loading = _LOADING.setdefault(key, threading.Lock())
    with loading:
        if key not in _KERNELS:
            variants = variants_of(spec, target, where, choose_ranges(spec, target, dependent=bool(pdl)), bundle)
            # Now, not in the middle of serving.  The host run compiles the others when it is asked to run them.
            for variant in variants[:1] if where.type == "cpu" else variants:
                variant.module()
            _KERNELS[key] = Kernel(spec, target, where, variants)
        return _KERNELS[key]


def _once(make: Callable[[], Made]) -> Callable[[], Made]:
    """`make`, run by the first thread that asks for it; the others get what it gave, or wait for it."""
    lock, made = threading.Lock(), functools.cache(make)

    def get() -> Made:
        with lock:
            return made()

    return get


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


def variants_of(
    spec: PrologueSpec, target: Target, device: torch.device, ranges: Sequence[Range], bundle: BundlePath | None = None
) -> list[Variant]:
    """The kernels of `ranges`, each found or compiled when it is first asked for, and loaded once."""

    @functools.cache
    def module(layout: Layout, aligned: bool) -> Callable[[], Module]:
        return _once(lambda: _load_module(spec, target, device, bundle, generate(spec, target, layout, aligned=aligned)))

    any_rows = device.type == "cpu" or target.unaligned_access
    variants = []
    for each in ranges:
        unaligned = None if any_rows else module(each.layout, False)
        variants.append(Variant(each, generate(spec, target, each.layout), module(each.layout, True), unaligned))
    return variants


def _load_module(
    spec: PrologueSpec, target: Target, device: torch.device, bundle: BundlePath | None, generated: GeneratedKernel
) -> Module:
    """A kernel, found or compiled, in the device's driver."""
    if device.type == "cpu":
        from mlagen.drivers.host import HostModule

        return HostModule(host_library(spec, generated))
    if torch.cuda.is_current_stream_capturing():
        raise MlagenError(
            f"kernel {generated.name} is not loaded yet, and the current stream is being captured: make a call with tensors like "
            "these before the capture (rows that do not start at multiples of 16 bytes have a kernel of their own)"
        )
    binary = device_binary(spec, generated, target, bundle)
    shared_limit = target.lds_bytes if generated.schedule.staging else 0
    return open_module(binary, generated.name, target, device, shared_limit=shared_limit, dependent=generated.dependent)


def open_module(
    binary: bytes, kernel: str, target: Target, device: torch.device, *, shared_limit: int = 0, dependent: bool = False
) -> Module:
    """`kernel` of a code object or cubin for `target`, loaded on a GPU.  Raises as the target's driver does."""
    if target.platform == "nvidia":
        from mlagen.drivers.cuda import CudaModule

        return CudaModule(binary, kernel, device.index, shared_limit=shared_limit, dependent=dependent)
    from mlagen.drivers.hip import HipModule

    return HipModule(binary, kernel, device.index)
