"""Runs gfx942 and gfx950 code objects on the CPU, one instruction of one wave at a time.

tinygrad's source tree has an emulator of the scalar and vector instructions, made from the pseudocode of AMD's ISA documents; its
wheel has not, so TINYGRAD_ROOT names a checkout (written against commit a9069c1).  Each instruction becomes a small C function,
compiled with clang when it is first met.  What tests of this project need beyond that is done here, in numpy:

- Memory.  Every access of every lane must lie within a span that the launch allows, at any alignment; how often each byte was
  written is counted.
- The 16x16 matrix instructions, because tinygrad's flush fp16 subnormals and have no fp16 infinities.  k is summed in ascending
  order, each product and sum rounded to fp32; the hardware rounds less often, so the last bit of a sum may differ there.
- ds_bpermute, because tinygrad's does not wrap lane numbers.
- fp8 conversions, in the flavour of the arch and with MODE.FP16_OVFL, and bf16 conversions, because tinygrad's lose NaN.
- Kernel arguments preloaded into SGPRs, and s_getpc_b64.
- A count of memory round trips: every load takes one unit of time, everything else none, and s_waitcnt waits.

There are no caches, no hazards (a missing s_nop goes unnoticed), no timing, and no flat, scratch or buffer accesses.
"""

import ctypes
import importlib
import mmap
import os
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

WAVE = 64
END = 2**64 - 1
"""The program counter of a wave that has ended."""

MAX_INSTRUCTIONS = 1_000_000
"""Of one wave; more is a loop without an end."""

IEEE_MODE = 0xF0
"""FLOAT_MODE of a kernel descriptor: round to nearest even, subnormals everywhere; the only one modelled."""

MODE, FP16_OVFL = 1, 1 << 23
"""The hardware register MODE, and its bit that makes fp8 conversions saturate."""

SDWA_WORD_0, SDWA_WORD_1, SDWA_DWORD = 4, 5, 6
"""Which part of a register an instruction with sub-dword addressing reads or writes."""

PRELOAD_ENTRY_BYTES = 256
"""Where firmware that preloads arguments enters a kernel: behind the instructions that load them for firmware that does not."""

GARBAGE = 0xA5A5A5A5
"""What registers and LDS hold before a kernel writes them; on the hardware, anything."""

_SCALARS = 108  # registers, VCC among them; EXEC and constants come after

U32 = npt.NDArray[np.uint32]
Handler = Callable[["Wave"], None]

_MEMORY_BASE = 4096
_memory = np.ctypeslib.as_array((ctypes.c_uint8 * (2**47 - _MEMORY_BASE)).from_address(_MEMORY_BASE))
"""This process's memory by address: addresses are checked before they get here."""


class EmulationError(Exception):
    """The machine code did what it must not do, or what is not modelled here."""


@dataclass
class Span:
    """Memory that a launch may use: `mode` is "r" or "w".

    `widths` are the bytes of the accesses to it, by one lane or by the scalar unit; `writes` says how often each byte was written.
    """

    address: int
    size: int
    mode: str
    widths: set[int] = field(init=False, default_factory=set)
    writes: npt.NDArray[np.uint16] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.writes = np.zeros(self.size if self.mode == "w" else 0, dtype=np.uint16)


@dataclass(frozen=True)
class WaveTrace:
    """What one wave did: executed instructions by mnemonic, and how many loads it waited for one after another."""

    workgroup: int
    counts: Counter[str]
    round_trips: int


class Wave:
    """A running wave; its registers are views of the memory that tinygrad's functions work on."""

    def __init__(self, emulator: ModuleType, workgroup: int, launch: "_Launch") -> None:
        self.workgroup, self.launch = workgroup, launch
        state = emulator.WaveState(WAVE, WAVE)
        self._state = state  # owns the memory
        files = (state.sgpr_buf, state.vgpr_buf, state.accvgpr_buf)
        self.scalars, vector, accumulation = (np.frombuffer(file.as_memoryview(force_zero_copy=True), np.uint32) for file in files)
        self.vectors, self.accumulators = vector.reshape(256, WAVE), accumulation.reshape(256, WAVE)
        self.scalars[:_SCALARS] = vector[:] = accumulation[:] = GARBAGE
        self._program_counter = state.sgpr_buf.as_memoryview(force_zero_copy=True).cast("Q")
        addresses = (files[0]._buf.va_addr, files[1]._buf.va_addr, 0, launch.lds, 0, files[2]._buf.va_addr)
        self.buffers = tuple(ctypes.c_uint64(address) for address in addresses)
        self.pcs: list[int] = []
        self.mode = launch.mode
        self.time = 0
        self.vector_queue: list[int] = []  # when each vector memory access is done, the oldest first
        self.scalar_queue: list[int] = []  # the same for scalar loads and LDS

    @property
    def pc(self) -> int:
        return self._program_counter[128]

    @pc.setter
    def pc(self, value: int) -> None:
        self._program_counter[128] = value

    def scalar64(self, register: int) -> int:
        return int(self.scalars[register]) | int(self.scalars[register + 1]) << 32

    def active(self) -> npt.NDArray[np.intp]:
        """The lanes that EXEC enables."""
        return np.flatnonzero(np.unpackbits(self.scalars[126:128].view(np.uint8), bitorder="little"))

    def file(self, accumulation: int) -> U32:
        return self.accumulators if accumulation else self.vectors

    def source(self, operand: int) -> U32:
        """A vector register or, for every lane, a scalar register or inline constant."""
        return self.vectors[operand - 256] if operand >= 256 else np.full(WAVE, self.scalars[operand])


@dataclass
class _Launch:
    """What the waves of one launch share."""

    spans: list[Span]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    lds: int
    mode: int


@dataclass(frozen=True)
class _Step:
    """One decoded instruction."""

    name: str
    run: Handler
    is_barrier: bool


class Emulator:
    """Runs code objects of one arch.  Raises EmulationError if TINYGRAD_ROOT names no checkout of tinygrad."""

    def __init__(self, arch: str) -> None:
        if arch not in _FP8_FLAVOURS:
            raise EmulationError(f"arch={arch!r}: one of {', '.join(_FP8_FLAVOURS)}")
        self.arch = arch
        self.tinygrad = _tinygrad()

    def load(self, code_object: bytes, kernel: str) -> "Kernel":
        return Kernel(self, code_object, kernel)


@cache
def _tinygrad() -> ModuleType:
    """tinygrad's emulator module."""
    root = os.environ.get("TINYGRAD_ROOT", "")
    if not os.path.isfile(os.path.join(root, "test/mockgpu/amd/emu.py")):
        raise EmulationError(f"TINYGRAD_ROOT={root!r} is not a checkout of tinygrad: it has no test/mockgpu/amd/emu.py")
    sys.path.insert(0, root)  # it imports itself as `test`, a name that the standard library has too
    try:
        return importlib.import_module("test.mockgpu.amd.emu")
    finally:
        sys.path.remove(root)


class Kernel:
    """One kernel of a code object; its resources are those that its descriptor states."""

    def __init__(self, emulator: Emulator, code_object: bytes, name: str) -> None:
        from tinygrad.runtime.support.elf import elf_loader

        self.name = name
        self._arch, self._tinygrad = emulator.arch, emulator.tinygrad
        image = bytes(elf_loader(code_object)[0])
        self._image = mmap.mmap(-1, len(image) + 4096)
        self._image[: len(image)] = image
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._image))
        at = _symbol(code_object, f"{name}.kd")
        descriptor = image[at : at + 64]
        self.lds_bytes, scratch_bytes, self.argument_bytes = struct.unpack_from("<III", descriptor, 0)
        self._entry = self._base + at + struct.unpack_from("<q", descriptor, 16)[0]
        rsrc1, self._rsrc2, self._properties, preload = struct.unpack_from("<IIHH", descriptor, 48)
        self.preloaded_words = preload & 0x7F
        if scratch_bytes or rsrc1 >> 12 & 0xFF != IEEE_MODE or preload >> 7:
            raise EmulationError(f"{name}: scratch memory, another floating-point mode or a preload offset: not modelled")
        self._mode = FP16_OVFL if rsrc1 >> 26 & 1 else 0
        self._steps: dict[int, _Step] = {}

    def launch(self, grid: int, threads: int, arguments: bytes, spans: Sequence[Span], *, preload: bool = True) -> list[WaveTrace]:
        """Run `grid` workgroups of `threads` lanes, one after another, and say what each wave did.

        `arguments` is the kernel's argument block; `spans` is the memory of this process that it may use beside its own.  With
        preload=False the kernel is entered as by firmware that does not preload arguments.
        """
        if len(arguments) != self.argument_bytes or threads % WAVE:
            raise EmulationError(f"{self.name}: {len(arguments)} bytes of arguments of {self.argument_bytes}, {threads} threads")
        block = np.frombuffer(arguments, np.uint8).copy()
        lds = np.empty(self.lds_bytes // 4 + 1, np.uint32)
        own = (Span(block.ctypes.data, len(arguments), "r"), Span(self._base, len(self._image), "r"))
        allowed = sorted((*spans, *own), key=lambda span: span.address)
        starts = np.array([span.address for span in allowed])
        launch = _Launch(allowed, starts, starts + [span.size for span in allowed], lds.ctypes.data, self._mode)
        user, entry = self._user_scalars(block, preload)
        traces = []
        for workgroup in range(grid):
            waves = []
            for first in range(0, threads, WAVE):
                wave = Wave(self._tinygrad, workgroup, launch)
                wave.pc = entry
                wave.scalars[: len(user)] = user
                wave.scalars[len(user)] = workgroup
                wave.vectors[0] = np.arange(first, first + WAVE)
                waves.append(wave)
            lds[:] = GARBAGE
            self._run_workgroup(waves)
            for wave in waves:
                counts = Counter(self._steps[pc].name for pc in wave.pcs)
                traces.append(WaveTrace(workgroup, counts, wave.time))
        return traces

    def _user_scalars(self, block: npt.NDArray[np.uint8], preload: bool) -> tuple[list[int], int]:
        """The scalar registers that the hardware sets, up to the workgroup's number, and the address at which a wave starts."""
        user: list[int] = []
        for bit, words in enumerate((4, 2, 2, 2, 2, 2, 1)):
            if self._properties >> bit & 1:
                user += [block.ctypes.data & 0xFFFFFFFF, block.ctypes.data >> 32] if bit == 3 else [0] * words
        preloaded = block[: 4 * self.preloaded_words].view(np.uint32).tolist()
        preload = preload and bool(preloaded)
        user += preloaded if preload else [0] * len(preloaded)
        if len(user) != self._rsrc2 >> 1 & 0x1F or not self._rsrc2 >> 7 & 1 or self._rsrc2 >> 8 & 3:
            raise EmulationError(f"{self.name}: its descriptor wants other registers than arguments and workgroup_id_x")
        return user, self._entry + PRELOAD_ENTRY_BYTES * preload

    def _run_workgroup(self, waves: list[Wave]) -> None:
        while waves := [wave for wave in waves if self._run_to_barrier(wave)]:  # waves that have ended are not waited for
            latest = max(wave.time for wave in waves)
            for wave in waves:
                wave.time = latest

    def _run_to_barrier(self, wave: Wave) -> bool:
        """Run a wave up to a barrier (True) or to its end."""
        while (pc := wave.pc) != END:
            step = self._steps.get(pc)
            if step is None:
                step = self._steps[pc] = self._decode(pc)
            wave.pcs.append(pc)
            step.run(wave)
            if step.is_barrier:
                return True
            if len(wave.pcs) > MAX_INSTRUCTIONS:
                raise EmulationError(f"{self.name}: a wave has not ended after {MAX_INSTRUCTIONS} instructions")
        return False

    def _decode(self, pc: int) -> _Step:
        code = ctypes.string_at(pc, 16)
        decoded = self._tinygrad.decode_inst(code, "cdna")
        instruction = Instruction(decoded, self._tinygrad._op_name(decoded), int.from_bytes(code, "little"))
        handler = _own_handler(instruction, self._arch)
        if handler is None:
            handler = self._compiled(pc, instruction)
        return _Step(instruction.name.lower(), handler, instruction.name == "S_BARRIER")

    def _compiled(self, pc: int, instruction: "Instruction") -> Handler:
        """tinygrad's function for an instruction."""
        (program, runtime), _ = self._tinygrad._decode_at(pc, "cdna")
        function, wanted = runtime.fxn, tuple(program.arg.globals)

        def run(wave: Wave) -> None:
            function(*[wave.buffers[index] for index in wanted])

        def run_lds(wave: Wave) -> None:
            wave.scalar_queue.append(wave.time)
            run(wave)

        def run_fp16(wave: Wave) -> None:
            if wave.mode & FP16_OVFL:
                raise EmulationError(f"{instruction.name.lower()}: fp16 arithmetic that saturates is not modelled")
            run(wave)

        if instruction.format == "DS":
            return run_lds
        return run_fp16 if re.search(r"(?<!F32)_F16", instruction.name) else run


class Instruction:
    """A decoded instruction: its mnemonic, the name of its encoding, and its fields as plain numbers."""

    def __init__(self, decoded: Any, name: str, code: int) -> None:
        self.name, self.format, self.size = name, type(decoded).__name__, decoded.size()
        self._encoding, self._code = type(decoded), code

    def __getitem__(self, name: str) -> int:
        bits = getattr(self._encoding, name)
        return self._code >> bits.lo & ((1 << (bits.hi - bits.lo + 1)) - 1)

    def signed(self, name: str) -> int:
        bits = getattr(self._encoding, name)
        width = bits.hi - bits.lo + 1
        return (self[name] ^ 1 << (width - 1)) - (1 << (width - 1))


def _own_handler(instruction: Instruction, arch: str) -> Handler | None:
    """What this module does itself; None leaves an instruction to tinygrad."""
    handler: Callable[..., None]
    name, encoding = instruction.name, instruction.format
    if encoding == "GLOBAL" and (access := re.fullmatch(r"GLOBAL_(LOAD|STORE)_(\w+)", name)):
        handler = partial(_global_access, instruction, access[1] == "STORE", *_access_width(access[2]))
    elif encoding == "SMEM" and (access := re.fullmatch(r"S_LOAD_DWORD(?:X(\d+))?", name)) and instruction["imm"]:
        handler = partial(_scalar_load, instruction, int(access[1] or 1))
    elif matrix := re.fullmatch(r"V_MFMA_F32_16X16X(\d+)_(B?F16)", name):
        handler = partial(_matrix, instruction, int(matrix[1]), 2, _widen_bf16 if matrix[2] == "BF16" else _widen_fp16)
    elif matrix := re.fullmatch(r"V_MFMA_F32_16X16X(\d+)_FP8_FP8", name):
        handler = partial(_matrix, instruction, int(matrix[1]), 1, _FP8_FLAVOURS[arch].decode)
    elif name.startswith("V_CVT_PK_F32_FP8"):
        handler = partial(_convert_from_fp8, instruction, _FP8_FLAVOURS[arch])
    elif name == "V_CVT_PK_FP8_F32":
        handler = partial(_convert_to_fp8, instruction, _FP8_FLAVOURS[arch])
    elif name == "V_CVT_PK_BF16_F32":
        handler = partial(_convert_to_bf16, instruction)
    elif name == "DS_BPERMUTE_B32":
        handler = partial(_permute, instruction)
    elif name == "S_WAITCNT":
        handler = partial(_wait, instruction)
    elif name == "S_GETPC_B64":
        handler = partial(_get_pc, instruction)
    elif name.startswith("S_SETREG"):
        handler = partial(_set_register, instruction)
    elif encoding in ("GLOBAL", "SMEM", "FLAT", "SCRATCH", "MUBUF") or "FP8" in name or "BF8" in name:
        raise EmulationError(f"{name.lower()} is not modelled")
    elif "DPP" in encoding and instruction["vsrc0"] == instruction["vdst"]:
        raise EmulationError(f"{name.lower()}: tinygrad writes lane after lane, so later lanes would read what earlier ones wrote")
    else:
        return None

    def run(wave: Wave) -> None:
        handler(wave)
        wave.pc += instruction.size

    return run


# Memory


def _access_width(suffix: str) -> tuple[int, bool, int | None]:
    """Bytes, whether they are sign-extended, and the half of the register that is meant (None: all of it)."""
    kind, _, half = suffix.partition("_D16")
    sizes = {"UBYTE": 1, "SBYTE": 1, "BYTE": 1, "USHORT": 2, "SSHORT": 2, "SHORT": 2}
    dwords = re.fullmatch(r"DWORD(?:X(\d))?", kind)
    size = 4 * int(dwords[1] or 1) if dwords else sizes[kind]
    return size, kind.startswith("S") and kind != "SHORT", (1 if half else 0) if "_D16" in suffix else None


def _check(wave: Wave, what: str, addresses: npt.NDArray[np.int64], size: int, mode: str) -> None:
    """Raise EmulationError unless each access lies within one span that allows it; count what is written."""
    launch = wave.launch
    span = np.searchsorted(launch.starts, addresses, "right") - 1
    inside = (span >= 0) & (addresses + size <= launch.ends[span])
    if not inside.all():
        bad = int(addresses[~inside][0])
        raise EmulationError(f"{what}: workgroup {wave.workgroup} accesses {size} bytes at {bad:#x}, outside its memory")
    for number in np.unique(span):
        found = launch.spans[number]
        if found.mode != mode:
            raise EmulationError(f"{what}: workgroup {wave.workgroup} accesses memory of mode {found.mode!r} for {mode!r}")
        found.widths.add(size)
        if mode == "w":
            touched = addresses[span == number, None] - found.address + np.arange(size)
            np.add.at(found.writes, touched, 1)


def _global_access(instruction: Instruction, is_store: bool, size: int, signed: bool, half: int | None, wave: Wave) -> None:
    lanes = wave.active()
    wave.vector_queue.append(max(wave.time + 1, wave.vector_queue[-1] if wave.vector_queue else 0))
    if not len(lanes):
        return
    register, scalar = instruction["addr"], instruction["saddr"]
    addresses = wave.vectors[register, lanes].astype(np.int64)
    if scalar < 124:
        addresses += wave.scalar64(scalar)
    else:
        addresses |= wave.vectors[register + 1, lanes].astype(np.int64) << 32
    addresses += instruction.signed("offset")
    _check(wave, instruction.name.lower(), addresses, size, "w" if is_store else "r")
    places = addresses[:, None] - _MEMORY_BASE + np.arange(size)
    file = wave.file(instruction["acc"])
    words = max(1, size // 4)
    if is_store:
        first = instruction["data"]
        data = np.ascontiguousarray(file[first : first + words, lanes].T).view(np.uint8)
        _memory[places] = data[:, 2 * (half or 0) :][:, :size]
        return
    target = file[instruction["vdst"] :][:words]
    if size >= 4:
        target[:, lanes] = _memory[places].view(np.uint32).T
        return
    kind = {(1, False): np.uint8, (1, True): np.int8, (2, False): np.uint16, (2, True): np.int16}[size, signed]
    value = _memory[places].view(kind)[:, 0].astype(np.int32).view(np.uint32)
    if half is None:
        target[0, lanes] = value
    else:
        shift = 16 * half
        target[0, lanes] = target[0, lanes] & np.uint32(0xFFFF0000 >> shift) | (value & np.uint32(0xFFFF)) << np.uint32(shift)


def _scalar_load(instruction: Instruction, words: int, wave: Wave) -> None:
    address = wave.scalar64(2 * instruction["sbase"]) + instruction.signed("offset")
    if instruction["soffset_en"]:
        address += int(wave.scalars[instruction["soffset"]])
    address &= ~3
    _check(wave, instruction.name.lower(), np.array([address]), 4 * words, "r")
    first = instruction["sdata"]
    wave.scalars[first : first + words] = np.frombuffer(ctypes.string_at(address, 4 * words), np.uint32)
    wave.scalar_queue.append(wave.time + 1)


def _wait(instruction: Instruction, wave: Wave) -> None:
    """Wait until no more than the given numbers of accesses are under way; vector accesses end in the order of their start."""
    counts = instruction["simm16"]
    for queue, left in ((wave.vector_queue, counts & 15 | counts >> 10 & 48), (wave.scalar_queue, counts >> 8 & 15)):
        for done in queue[: max(0, len(queue) - left)]:
            wave.time = max(wave.time, done)
        del queue[: max(0, len(queue) - left)]


def _permute(instruction: Instruction, wave: Wave) -> None:
    """Each lane takes the value of the lane that its address names; of an inactive lane it takes zero."""
    lanes = wave.active()
    offset = instruction["offset1"] << 8 | instruction["offset0"]
    named = (wave.vectors[instruction["addr"], lanes].astype(np.int64) + offset) // 4 % WAVE
    values = wave.vectors[instruction["data0"]].copy()
    values[np.setdiff1d(np.arange(WAVE), lanes)] = 0
    wave.vectors[instruction["vdst"], lanes] = values[named]
    wave.scalar_queue.append(wave.time)


# Arithmetic


def _widen_bf16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _widen_fp16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return bits.view(np.float16).astype(np.float32)


def _matrix(instruction: Instruction, k: int, size: int, widen: Callable[..., npt.NDArray[np.float32]], wave: Wave) -> None:
    """D[m,n] = sum over k of A[m,k] * B[k,n] + C[m,n], with the register layout of the CDNA3 and CDNA4 ISA documents.

    Lane i holds A[i % 16, :] and B[:, i % 16] for the k/4 values of k from i / 16 * k/4 on, and rows i / 16 * 4 to + 3 of column
    i % 16 of C and D.  A and B have elements of `size` bytes.
    """

    def operand(number: int) -> npt.NDArray[np.float32]:
        at = instruction[f"src{number}"] - 256
        if at < 0:
            raise EmulationError(f"{instruction.name.lower()}: src{number} is not a vector register")
        words = wave.file(instruction["acc"] >> number & 1)[at : at + k * size // 16]
        return widen(np.ascontiguousarray(words.T).view(f"u{size}")).reshape(4, 16, k // 4).transpose(1, 0, 2).reshape(16, k)

    if instruction["cbsz"] or instruction["abid"] or instruction["blgp"]:
        raise EmulationError(f"{instruction.name.lower()}: operand broadcast is not modelled")
    at = instruction["src2"]
    sums = wave.file(instruction["acc_cd"])
    c = sums[at - 256 : at - 252] if at >= 256 else np.full((4, WAVE), wave.scalars[at])
    c_rows = c.view(np.float32).reshape(4, 4, 16).transpose(1, 0, 2).reshape(16, 16)
    a, b = operand(0), operand(1)
    with np.errstate(all="ignore"):
        terms = np.concatenate((c_rows[None], a.T[:, :, None] * b.T[:, None, :]))
        d = np.add.accumulate(terms)[-1]
    sums[instruction["vdst"] :][:4] = d.reshape(4, 4, 16).transpose(1, 0, 2).reshape(4, WAVE).view(np.uint32)


@dataclass(frozen=True)
class _Fp8Flavour:
    """An e4m3 format: exponent bias, code of NaN, largest finite code, and whether it is FNUZ (one NaN, no negative zero)."""

    bias: int
    nan: int
    largest: int
    fnuz: bool

    def encode(self, x: npt.NDArray[np.float32], saturate: bool) -> U32:
        """Codes of `x` rounded to nearest even; finite overflow becomes NaN or, with MODE.FP16_OVFL, the largest code."""
        bits = x.view(np.uint32).astype(np.int64)
        sign, magnitude = bits >> 24 & 0x80, bits & 0x7FFFFFFF
        normal = (magnitude + 0x7FFFF + (magnitude >> 20 & 1) >> 20) - (127 - self.bias << 3)
        with np.errstate(all="ignore"):
            steps = np.abs(x).astype(np.float64) * 2.0 ** (self.bias + 2)
            code = np.where(magnitude < 128 - self.bias << 23, np.rint(steps), normal).astype(np.int64)
        overflow = code > self.largest
        code = np.where(overflow, self.largest if saturate else self.nan, code)
        code = np.where(magnitude > (0x7F800000 if saturate else 0x7F7FFFFF), self.nan, code)
        if self.fnuz:
            code = np.where((code == self.nan) | (code == 0), code, code | sign)
        else:
            code |= sign
        return code.astype(np.uint32)

    def decode(self, codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """What codes mean; all are normal numbers of fp32."""
        codes = codes.astype(np.int64)
        exponent, mantissa = codes >> 3 & 15, codes & 7
        magnitude = np.ldexp(np.where(exponent > 0, 8 + mantissa, mantissa), np.maximum(exponent, 1) - self.bias - 3)
        value = np.where(codes & 0x80, -magnitude, magnitude)
        return np.where(codes & (0xFF if self.fnuz else 0x7F) == self.nan, np.nan, value).astype(np.float32)


_FP8_FLAVOURS = {
    "gfx942": _Fp8Flavour(bias=8, nan=0x80, largest=0x7F, fnuz=True),
    "gfx950": _Fp8Flavour(bias=7, nan=0x7F, largest=0x7E, fnuz=False),
}


def _converted(instruction: Instruction, number: int, lanes: npt.NDArray[np.intp], wave: Wave) -> U32:
    """Source `number` of a conversion, its modifiers applied."""
    if instruction["omod"] or instruction["clmp"]:
        raise EmulationError(f"{instruction.name.lower()}: output modifiers are not modelled")
    bits = wave.source(instruction[f"src{number}"])[lanes]
    if instruction["abs"] >> number & 1:
        bits &= np.uint32(0x7FFFFFFF)
    if instruction["neg"] >> number & 1:
        bits ^= np.uint32(0x80000000)
    return bits


def _convert_to_fp8(instruction: Instruction, flavour: _Fp8Flavour, wave: Wave) -> None:
    """Two fp32 values to two codes in one half of the destination; the other half stays."""
    lanes = wave.active()
    sources = (_converted(instruction, number, lanes, wave) for number in (0, 1))
    first, second = (flavour.encode(bits.view(np.float32), bool(wave.mode & FP16_OVFL)) for bits in sources)
    shift = 16 if instruction["opsel"] >> 3 & 1 else 0
    target = wave.vectors[instruction["vdst"]]
    target[lanes] = target[lanes] & np.uint32(0xFFFF0000 >> shift) | (first | second << np.uint32(8)) << np.uint32(shift)


def _convert_from_fp8(instruction: Instruction, flavour: _Fp8Flavour, wave: Wave) -> None:
    """Two codes of one half of the source, which SDWA selects, to fp32."""
    lanes, shift = wave.active(), 0
    if instruction.format == "VOP1_SDWA":
        selected = instruction["src0_sel"]
        changed = [field for field in ("omod", "clmp", "src0_neg", "src0_abs", "src0_sext", "s0") if instruction[field]]
        if changed or selected not in (SDWA_WORD_0, SDWA_WORD_1, SDWA_DWORD) or instruction["dst_sel"] != SDWA_DWORD:
            raise EmulationError(f"{instruction.name.lower()}: these modifiers are not modelled")
        bits, shift = wave.vectors[instruction["vsrc0"]], 16 if selected == SDWA_WORD_1 else 0
    elif instruction.format == "VOP1":
        bits = wave.source(instruction["src0"])
    else:
        raise EmulationError(f"{instruction.name.lower()}: {instruction.format} is not modelled")
    codes = bits[lanes] >> np.uint32(shift)
    for number in (0, 1):
        wave.vectors[instruction["vdst"] + number, lanes] = flavour.decode(codes >> np.uint32(8 * number) & 0xFF).view(np.uint32)


def _convert_to_bf16(instruction: Instruction, wave: Wave) -> None:
    """Two fp32 values to bf16, to nearest even; a NaN becomes quiet and keeps what fits of its payload."""
    lanes = wave.active()
    halves = []
    for number in (0, 1):
        bits = _converted(instruction, number, lanes, wave).astype(np.int64)
        rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
        halves.append(np.where(bits & 0x7FFFFFFF > 0x7F800000, bits >> 16 | 0x40, rounded).astype(np.uint32))
    wave.vectors[instruction["vdst"]][lanes] = halves[0] | halves[1] << np.uint32(16)


def _get_pc(instruction: Instruction, wave: Wave) -> None:
    after = wave.pc + instruction.size
    first = instruction["sdst"]
    wave.scalars[first : first + 2] = after & 0xFFFFFFFF, after >> 32


def _set_register(instruction: Instruction, wave: Wave) -> None:
    """S_SETREG: of the hardware's registers only MODE.FP16_OVFL can be set."""
    what = instruction["simm16"]
    register, offset, bits = what & 63, what >> 6 & 31, (what >> 11 & 31) + 1
    mask = (1 << bits) - 1 << offset
    if register != MODE or mask != FP16_OVFL:
        raise EmulationError(f"{instruction.name.lower()}: of hardware register {register} bits {mask:#x} are not modelled")
    value = instruction["literal"] if "IMM32" in instruction.name else int(wave.scalars[instruction["sdst"]])
    wave.mode = wave.mode & ~mask | value << offset & mask


def _symbol(elf: bytes, name: str) -> int:
    """The value of a defined symbol of a 64-bit little-endian ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry_size, entries = struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * entry_size) for i in range(entries)]
    for _, kind, _, _, offset, size, link, _, _, symbol_size in sections:
        if kind not in (2, 11):  # SHT_SYMTAB, SHT_DYNSYM
            continue
        strings = sections[link][4]
        for at in range(offset, offset + size, symbol_size):
            string, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", elf, at)
            end = elf.index(b"\0", strings + string)
            if section and elf[strings + string : end].decode() == name:
                return value
    raise EmulationError(f"the code object has no symbol {name!r}")
