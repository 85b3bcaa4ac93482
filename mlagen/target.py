"""Targets: what the compiler must know of a GPU architecture, as data.

Matrix instructions are described by their lane maps, and the maps prove themselves when they are made: the generated index
arithmetic, the packing of the weights and the host emulation all derive from the same few numbers.

Sources: AMD Instinct MI300 and CDNA4 instruction set architecture guides (register files, LDS, matrix instructions and their
register layouts), AMD's product data sheets (compute units, XCDs, caches, HBM bandwidth).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mlagen.dtypes import DType
from mlagen.errors import TargetError


@dataclass(frozen=True)
class Digit:
    """One digit of a lane or register number: it takes `size` values and moves `stride` steps along `axis` ("m", "n" or "k")."""

    size: int
    axis: str
    stride: int


@dataclass(frozen=True)
class FragmentMap:
    """Which element of a matrix operand each register of each lane holds.

    A lane number is split into the `lane` digits, least significant first, and a register number into the `register` digits; each
    coordinate is the sum of its digits' contributions.  `shape` gives the extent of the two axes.  The map must be a bijection:
    an element held twice would be summed twice, one held nowhere would be lost.
    """

    shape: tuple[tuple[str, int], tuple[str, int]]
    lane: tuple[Digit, ...]
    register: tuple[Digit, ...]

    def __post_init__(self) -> None:
        extents = dict(self.shape)
        places = {
            tuple(self.coordinate(axis, lane, register) for axis in extents)
            for lane, register in itertools.product(range(self.lanes), range(self.registers))
        }
        everything = set(itertools.product(*(range(extent) for extent in extents.values())))
        if places != everything or len(places) != self.lanes * self.registers:
            raise TargetError(f"fragment map {self.shape}: {self.lanes} lanes x {self.registers} registers do not cover it once")

    @property
    def lanes(self) -> int:
        return _product(self.lane)

    @property
    def registers(self) -> int:
        """Elements that one lane holds."""
        return _product(self.register)

    def coordinate(self, axis: str, lane: int, register: int) -> int:
        """Position along `axis` of the element in `register` of `lane`."""
        return _position(self.lane, axis, lane) + _position(self.register, axis, register)

    def lane_expression(self, axis: str, lane: str = "lane", *, scale: int | None = None) -> str:
        """C++ expression of the lane digits' position along `axis`; with `scale`, of the digit itself times `scale`."""
        return _expression(self.lane, axis, lane, scale)

    def register_expression(self, axis: str, register: str = "register") -> str:
        """C++ expression of the register digits' position along `axis`."""
        return _expression(self.register, axis, register, None)

    def holder(self, axis: str, position: int) -> tuple[int, int]:
        """(number of the lane group, number among the group's registers) that together hold `position` along `axis`."""
        for group in range(self.groups(axis)):
            for held in range(self.run(axis)):
                if _along(self.lane, axis, group) + _along(self.register, axis, held) == position:
                    return group, held
        raise TargetError(f"fragment map {self.shape}: nothing holds {axis}={position}")

    def held_number(self, **expressions: str) -> str:
        """C++ expression of the register number from an expression of the position held along each axis (one digit each)."""
        terms, below = [], 1
        for digit in self.register:
            term = expressions[digit.axis]
            terms.append(term if below == 1 else f"{term} * {below}")
            below *= digit.size
        return " + ".join(terms)

    def run(self, axis: str) -> int:
        """How many elements a lane holds along `axis`."""
        return _product(tuple(digit for digit in self.register if digit.axis == axis))

    def groups(self, axis: str) -> int:
        """Into how many groups the lanes fall along `axis`."""
        return _product(tuple(digit for digit in self.lane if digit.axis == axis))


def _product(digits: tuple[Digit, ...]) -> int:
    product = 1
    for digit in digits:
        product *= digit.size
    return product


def _position(digits: tuple[Digit, ...], axis: str, number: int) -> int:
    position = 0
    for digit in digits:
        number, value = divmod(number, digit.size)
        if digit.axis == axis:
            position += value * digit.stride
    return position


def _along(digits: tuple[Digit, ...], axis: str, number: int) -> int:
    """Position along `axis` of value `number` of the digits that move along it."""
    return _position(tuple(digit for digit in digits if digit.axis == axis), axis, number)


def _expression(digits: tuple[Digit, ...], axis: str, number: str, scale: int | None) -> str:
    """C++ for _position over the digits, without operations that change nothing."""
    terms = []
    below, total = 1, _product(digits)
    for digit in digits:
        if digit.axis == axis:
            term = number if below == 1 else f"{number} / {below}"
            if below * digit.size != total:
                term += f" % {digit.size}"
            stride = digit.stride if scale is None else scale
            terms.append(term if stride == 1 else f"{term} * {stride}")
        below *= digit.size
    return " + ".join(terms) or "0"


@dataclass(frozen=True)
class MmaAtom:
    """One matrix instruction: D[m,n] = sum over k of A[m,k] * B[k,n] + C[m,n], fp32 accumulation, C and D mapped alike.

    `builtin` is clang's name for it, or the PTX instruction, and `operand` the type that it takes for A and B, whose elements have
    `element_bytes` each.
    """

    builtin: str
    operand: str
    m: int
    n: int
    k: int
    a: FragmentMap
    b: FragmentMap
    d: FragmentMap
    element_bytes: int = 2

    def __post_init__(self) -> None:
        expected = ((("m", self.m), ("k", self.k)), (("k", self.k), ("n", self.n)), (("m", self.m), ("n", self.n)))
        if (self.a.shape, self.b.shape, self.d.shape) != expected:
            raise TargetError(f"{self.builtin}: fragment shapes do not fit {self.m}x{self.n}x{self.k}")
        if len({fragment.lanes for fragment in (self.a, self.b, self.d)}) != 1:
            raise TargetError(f"{self.builtin}: its operands are spread over different numbers of lanes")

    @property
    def lanes(self) -> int:
        return self.d.lanes


def _mfma_16x16(k: int, builtin: str, operand: str, element_bytes: int = 2) -> MmaAtom:
    """CDNA's 16x16 family: the 64 lanes are 4 groups of 16; a group holds k/4 consecutive k of one row (A) or column (B)."""
    held = k // 4
    return MmaAtom(
        builtin,
        operand,
        16,
        16,
        k,
        a=FragmentMap((("m", 16), ("k", k)), (Digit(16, "m", 1), Digit(4, "k", held)), (Digit(held, "k", 1),)),
        b=FragmentMap((("k", k), ("n", 16)), (Digit(16, "n", 1), Digit(4, "k", held)), (Digit(held, "k", 1),)),
        d=FragmentMap((("m", 16), ("n", 16)), (Digit(16, "n", 1), Digit(4, "m", 4)), (Digit(4, "m", 1),)),
        element_bytes=element_bytes,
    )


def _mma_m16n8(operand: str, element_bytes: int = 2) -> MmaAtom:
    """NVIDIA's mma.sync m16n8k16, or k32 for 8-bit types: the 32 lanes are 8 groups of 4, which hold one row of A and D, or one
    column of B; a register of a lane is a word of neighbouring k.

    Source: PTX ISA, sections on matrix fragments for mma.m16n8k16 with 16-bit types and for mma.m16n8k32.
    """
    word, k = 4 // element_bytes, 32 // element_bytes
    return MmaAtom(
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.{operand}.{operand}.f32",
        operand,
        16,
        8,
        k,
        a=FragmentMap(
            (("m", 16), ("k", k)),
            (Digit(4, "k", word), Digit(8, "m", 1)),
            (Digit(word, "k", 1), Digit(2, "m", 8), Digit(2, "k", 4 * word)),
        ),
        b=FragmentMap(
            (("k", k), ("n", 8)), (Digit(4, "k", word), Digit(8, "n", 1)), (Digit(word, "k", 1), Digit(2, "k", 4 * word))
        ),
        d=FragmentMap((("m", 16), ("n", 8)), (Digit(4, "n", 2), Digit(8, "m", 1)), (Digit(2, "n", 1), Digit(2, "m", 8))),
        element_bytes=element_bytes,
    )


@dataclass(frozen=True)
class SharedProduct:
    """A product whose B operand lies in shared memory: `waves` waves issue it together, each for the rows that it holds.

    What a wave brings of A and gets of D are the registers of the target's matrix instruction, one after another along n; `blocks`
    are the n that one instruction may cover.  B lies in octets: 8 consecutive k of 8 columns, a column after the other.
    `instruction` is the PTX instruction, with the n left open.
    """

    instruction: str
    waves: int
    blocks: tuple[int, ...]


def _wgmma(operand: str) -> SharedProduct:
    """Hopper's wgmma m64nNk16 with A in registers: a warp's 16 of the 64 rows lie as in m16n8k16.

    Source: PTX ISA, sections on wgmma.mma_async and on its register and shared memory fragments (no swizzle, K-major).
    """
    return SharedProduct(f"wgmma.mma_async.sync.aligned.m64n{{n}}k16.f32.{operand}.{operand}", 4, (8, 16, 24, 32, 48, 64))


@dataclass(frozen=True)
class Target:
    """One GPU architecture.

    `platform` names the device library and the driver: "amd" or "nvidia".  `registers_per_lane` counts one SIMD lane's file (on AMD
    architectural plus accumulation registers), `registers_per_wave_lane` what one wave may use of it; `xcds` are the dies that
    workgroups are dealt to in turn, each with its own L2; `last_cache_bytes` is the size of the cache before memory, which is AMD's
    Infinity Cache and the L2 of an H200; `hbm_bytes_per_second` is the data sheet's peak; `unaligned_access` says whether a wide
    access may start at any address; with `dependent_launch` a kernel may start before the one before it has ended.
    """

    arch: str
    products: str
    platform: str
    wave: int
    registers_per_lane: int
    registers_per_wave_lane: int
    simds_per_cu: int
    max_waves_per_simd: int
    lds_bytes: int
    compute_units: int
    xcds: int
    last_cache_bytes: int
    hbm_bytes_per_second: float
    unaligned_access: bool
    fp8: DType
    atoms: tuple[tuple[DType, MmaAtom], ...]
    shared_products: tuple[tuple[DType, SharedProduct], ...] = ()
    dependent_launch: bool = False

    def __post_init__(self) -> None:
        if not self.fp8.is_fp8:
            raise TargetError(f"{self.arch}: {self.fp8} is not an fp8 type")
        for dtype, atom in self.atoms:
            if atom.lanes != self.wave:
                raise TargetError(f"{self.arch}: the {dtype} atom spans {atom.lanes} lanes, a wave has {self.wave}")

    def atom(self, dtype: DType) -> MmaAtom:
        """The matrix instruction for operands of `dtype`."""
        return dict(self.atoms)[dtype]

    def shared_product(self, dtype: DType) -> SharedProduct | None:
        """The product from shared memory for operands of `dtype`, where the target has one."""
        return dict(self.shared_products).get(dtype)

    def waves_per_simd(self, registers: int) -> int:
        """Waves that fit on one SIMD when each lane needs `registers`; registers are handed out in blocks of 8."""
        return min(self.max_waves_per_simd, self.registers_per_lane // max(8, -(-registers // 8) * 8))


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.arch: target
        for target in (
            Target(
                arch="gfx942",
                products="MI300X, MI300A, MI325X",
                platform="amd",
                wave=64,
                registers_per_lane=512,
                registers_per_wave_lane=512,
                simds_per_cu=4,
                max_waves_per_simd=8,
                lds_bytes=64 * 1024,
                compute_units=304,
                xcds=8,
                last_cache_bytes=256 << 20,
                hbm_bytes_per_second=5.3e12,
                unaligned_access=True,
                fp8=DType.E4M3FNUZ,
                atoms=(
                    (DType.BF16, _mfma_16x16(16, "__builtin_amdgcn_mfma_f32_16x16x16bf16_1k", "int16x4")),
                    (DType.FP16, _mfma_16x16(16, "__builtin_amdgcn_mfma_f32_16x16x16f16", "float16x4")),
                    (DType.E4M3FNUZ, _mfma_16x16(32, "__builtin_amdgcn_mfma_f32_16x16x32_fp8_fp8", "long", 1)),
                ),
            ),
            Target(
                arch="gfx950",
                products="MI350X, MI355X",
                platform="amd",
                wave=64,
                registers_per_lane=512,
                registers_per_wave_lane=512,
                simds_per_cu=4,
                max_waves_per_simd=8,
                lds_bytes=160 * 1024,
                compute_units=256,
                xcds=8,
                last_cache_bytes=256 << 20,
                hbm_bytes_per_second=8.0e12,
                unaligned_access=True,
                fp8=DType.E4M3FN,
                atoms=(
                    (DType.BF16, _mfma_16x16(32, "__builtin_amdgcn_mfma_f32_16x16x32_bf16", "bfloat16x8")),
                    (DType.FP16, _mfma_16x16(32, "__builtin_amdgcn_mfma_f32_16x16x32_f16", "float16x8")),
                    (DType.E4M3FN, _mfma_16x16(32, "__builtin_amdgcn_mfma_f32_16x16x32_fp8_fp8", "long", 1)),
                ),
            ),
            Target(
                arch="sm_90",
                products="H100, H200",
                platform="nvidia",
                wave=32,
                registers_per_lane=512,
                registers_per_wave_lane=255,
                simds_per_cu=4,
                max_waves_per_simd=16,
                lds_bytes=227 * 1024,
                compute_units=132,
                xcds=1,
                last_cache_bytes=60 << 20,
                hbm_bytes_per_second=4.8e12,
                unaligned_access=False,
                fp8=DType.E4M3FN,
                atoms=((DType.BF16, _mma_m16n8("bf16")), (DType.FP16, _mma_m16n8("f16")), (DType.E4M3FN, _mma_m16n8("e4m3", 1))),
                shared_products=((DType.BF16, _wgmma("bf16")), (DType.FP16, _wgmma("f16"))),
                dependent_launch=True,
            ),
        )
    }
)


def find_target(arch: str) -> Target:
    """The target called `arch`; feature suffixes as in "gfx942:sramecc+:xnack-" are accepted.  Raises TargetError."""
    target = TARGETS.get(arch.split(":")[0]) if isinstance(arch, str) else None
    if target is None:
        supported = ", ".join(f"{name} ({each.products})" for name, each in TARGETS.items())
        raise TargetError(f"arch={arch!r} is not supported: choose one of {supported}")
    return target
