"""What is computed at an element: casts, quantisation to fp8, and the products of a rotation."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from mlagen.fx.index import Index, Unreadable
from mlagen.fx.known import Row, Turned, codes, turned
from mlagen.fx.mutation import functional_call
from mlagen.fx.operators import FP8_TYPES
from mlagen.fx.reader import Place, Reader, argument, is_call, value_of

aten, prims = torch.ops.aten, torch.ops.prims

CASTS = (prims.convert_element_type.default, aten._to_copy.default)
SUMS = (aten.add.Tensor, aten.sub.Tensor)


@dataclass(frozen=True)
class Quant:
    """A static quantisation, code = fp8(clamp(value / scale, -limit, limit)); `scale` is a node of one fp32 number, None is 1.

    divides: not as the product with the reciprocal, rounded to fp32 first.
    """

    dtype: torch.dtype
    scale: fx.Node | None
    limit: float
    divides: bool


@dataclass(frozen=True)
class Factor:
    """What a rotation multiplies: the way to where it came from, and which part of it where that is complex.

    Where an operator looks a cosine or sine up itself, there is no way, but a row.  `negated` is the way up to where a sign was
    taken out: what is there has the other sign, and is no place to read the factor from.
    """

    chain: tuple[Place, ...]
    part: Literal[0, 1] | None = None
    row: Row | None = None
    negated: tuple[Place, ...] = ()

    @property
    def key(self) -> object:
        """Equal for equal numbers."""
        return self.row or (self.chain[-1], self.part)


Term = tuple[int, Factor, Factor]
"""A signed product."""


@dataclass
class Values:
    """Follows elements through arithmetic, and remembers the nodes that it passed and the types that it was cast to."""

    reader: Reader
    seen: dict[fx.Node, None] = field(default_factory=dict)
    casts: dict[torch.dtype, None] = field(default_factory=dict)

    def record(self, chain: Sequence[Place]) -> None:
        for node, _ in chain:
            self.seen[node] = None
            if node.target is operator.getitem and functional_call(node.args[0]) is None:
                self.seen[node.all_input_nodes[0]] = None  # the split that it is a part of
            elif is_call(node, aten.copy.default):
                self.seen[node.all_input_nodes[0]] = None  # written over: only its extents matter

    def chain(self, place: Place) -> list[Place]:
        """The way back through moves and casts between floating types wider than fp8; nothing is recorded of it."""
        places = self.reader.trace(*place)
        while is_call(places[-1][0], *CASTS):
            node, index = places[-1]
            source = argument(node, 0, "self")
            types = value_of(node).dtype, value_of(source).dtype
            if not all(each.is_floating_point and each.itemsize > 1 for each in types):
                break
            self.casts.update((each, None) for each in types)
            places += self.reader.trace(source, index)
        return places

    def follow(self, place: Place) -> list[Place]:
        """The same, recorded."""
        found = self.chain(place)
        self.record(found)
        return found

    def bits(self, place: Place) -> Place:
        """Through views of a value's bytes as another type of the same width."""
        chain = self.reader.trace(*place)
        self.record(chain)
        node, index = chain[-1]
        if is_call(node, aten.view.dtype):
            source = argument(node, 0, "self")
            if value_of(source).dtype.itemsize != value_of(node).dtype.itemsize:
                raise Unreadable(f"{node.name} changes the width of an element")
            return self.bits((source, index))
        return node, index

    def quantization(self, place: Place) -> tuple[Place, Quant | None]:
        """The value that is quantised, and how; the place itself where its type is not fp8."""
        if value_of(place[0]).dtype not in (*FP8_TYPES, torch.uint8):
            return place, None
        node, index = self.bits(place)
        dtype = value_of(node).dtype
        if dtype not in FP8_TYPES:
            raise Unreadable(f"{node.name}: bytes that are no fp8 codes, but {dtype}")
        if (written := self.reader.written((node, index))) is not None:
            return self._known_codes(node, written, dtype)
        if not is_call(node, *CASTS):
            raise Unreadable(f"{node.name}: {dtype} codes that are not made by a cast")
        place = self._operand(node, index, 0)
        low, high = -float("inf"), float("inf")
        while is_call(place[0], aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default):
            node, index = place
            first, second = argument(node, 1, "min"), argument(node, 2, "max")
            if node.target is aten.clamp_max.default:
                first, second = None, argument(node, 1, "max")
            if not all(each is None or isinstance(each, int | float) for each in (first, second)):
                raise Unreadable(f"{node.name} clamps to a tensor")
            low, high = max(low, low if first is None else first), min(high, high if second is None else second)
            place = self._operand(node, index, 0)
        if low != -high or not 0 < high <= torch.finfo(dtype).max:
            raise Unreadable(f"{node.name}: a cast to {dtype} that does not saturate at one magnitude within the format")
        place, scale, divides = self._unscaled(place)
        return place, Quant(dtype, scale, float(high), divides)

    def _known_codes(self, node: fx.Node, written: Any, dtype: torch.dtype) -> tuple[Place, Quant]:
        """What an operator quantised."""
        call, name, index = written
        found = codes(call, name, index, dtype, self.reader.sizes)
        scale = self.scale(found.scale) if found else None
        if found is None or scale is None:
            raise Unreadable(f"{node.name}: codes by {call.name}, which is not known to make them with one fp32 scale")
        chain = self.reader.trace(*found.value)
        self.record(chain)
        return chain[-1], Quant(dtype, scale, found.limit, found.divides)

    def _unscaled(self, place: Place) -> tuple[Place, fx.Node | None, bool]:
        node, index = place
        if is_call(node, aten.div.Tensor, aten.mul.Tensor):
            factors = [argument(node, 0, "self"), argument(node, 1, "other")]
            if node.target is aten.div.Tensor:
                scale, value, divides = self.scale(factors[1]), factors[0], True
            else:
                inverse = [self._reciprocal(each) for each in factors]
                scale, divides = inverse[0] or inverse[1], False
                value = factors[0] if inverse[1] else factors[1]
            if scale is not None:
                if value_of(node).dtype is not torch.float32:
                    raise Unreadable(f"{node.name} scales in {value_of(node).dtype}, which rounds before fp8 does")
                return self._operand(node, index, factors.index(value)), scale, divides
        return place, None, False

    def _reciprocal(self, node: object) -> fx.Node | None:
        """The scale, where a node is the reciprocal of one."""
        if not isinstance(node, fx.Node) or not _is_one_number(value_of(node)):
            return None
        found = self.reader.source(node, [Index()] * value_of(node).dim())[0]
        return self.scale(argument(found, 0, "self")) if is_call(found, aten.reciprocal.default) else None

    def scale(self, node: object) -> fx.Node | None:
        """A node of one fp32 number, [] or [1], that this one shows; None where there is none."""
        if not isinstance(node, fx.Node) or not _is_one_number(value_of(node)):
            return None
        for found, _ in reversed(self.reader.trace(node, [Index()] * value_of(node).dim())):
            value = value_of(found)
            if value.dtype is torch.float32 and value.shape in ((), (1,)):
                return found
        return None

    def _operand(self, node: fx.Node, index: tuple[Index, ...], number: int) -> Place:
        """Where the element of an operand comes from, recorded."""
        operand = node.args[number]
        assert isinstance(operand, fx.Node)
        chain = self.reader.trace(*self.reader.operand(node, index, operand))
        self.record(chain)
        return chain[-1]

    # Rotations.

    def terms(self, place: Place) -> list[Term]:
        """The signed products that an element is the sum of; none where it is no such sum.  Sums and products are recorded."""
        chain = self.follow(place)
        node, index = chain[-1]
        if (written := self.reader.written(chain[-1])) is not None:
            found = turned(*written, self.reader.sizes)
            return self.products(found) if found is not None else []
        if is_call(node, aten.view_as_real.default):
            part, complex_index = self._part(index)
            source = argument(node, 0, "self")
            chain = self.reader.trace(source, complex_index)
            self.record(chain)
            return self._complex_terms(chain[-1], part)
        if is_call(node, *SUMS) and argument(node, 2, "alpha", 1) == 1:
            sign = 1 if node.target is aten.add.Tensor else -1
            first, second = (self._real(node, index, number) for number in (0, 1))
            if first is None or second is None:
                return []
            return self.terms(first) + [(sign * each, one, other) for each, one, other in self.terms(second)]
        if is_call(node, aten.mul.Tensor):
            return self._product(*(self._real(node, index, number) for number in (0, 1)))
        return []

    def products(self, found: Turned) -> list[Term]:
        """The same of an element that an operator rotated."""
        return [(sign, Factor(tuple(self.chain(x))), Factor((), row=row)) for sign, x, row in found.products]

    def _real(self, node: fx.Node, index: tuple[Index, ...], number: int) -> Place | None:
        operand: Any = node.args[number]
        if not isinstance(operand, fx.Node) or not value_of(operand).dtype.is_floating_point:
            return None
        return self.reader.operand(node, index, operand)

    def _product(self, first: Place | None, second: Place | None) -> list[Term]:
        if first is None or second is None:
            return []
        (one, left), (other, right) = self.factor(first), self.factor(second)
        return [(one * other, left, right)]

    def factor(self, place: Place) -> tuple[int, Factor]:
        """A sign and what has it."""
        chain = self.chain(place)
        node, index = chain[-1]
        if is_call(node, aten.neg.default):
            sign, found = self.factor((argument(node, 0, "self"), index))
            return -sign, dataclasses.replace(found, negated=(*chain, *found.negated))
        if is_call(node, aten.view_as_real.default):
            part, complex_index = self._part(index)
            return 1, self._complex_factor((argument(node, 0, "self"), complex_index), part, tuple(chain))
        return 1, Factor(tuple(chain))

    def record_turned(self, columns: Sequence[list[Term]], is_table: Callable[[Factor], bool]) -> None:
        """Record how every product came by what is turned; the tables may be anybody's."""
        for _, *factors in (term for terms in columns for term in terms):
            for factor in factors:
                if not is_table(factor):
                    self.record((*factor.negated, *factor.chain))

    def _part(self, index: tuple[Index, ...]) -> tuple[Literal[0, 1], tuple[Index, ...]]:
        if index[-1] == Index(0):
            return 0, index[:-1]
        if index[-1] == Index(1):
            return 1, index[:-1]
        raise Unreadable("both parts of a complex number at once")

    def _complex_terms(self, place: Place, part: Literal[0, 1]) -> list[Term]:
        node, index = place
        if not is_call(node, aten.mul.Tensor) or not all(isinstance(each, fx.Node) for each in node.args[:2]):
            return []
        first, second = (self.reader.operand(node, index, operand) for operand in node.args[:2])  # type: ignore[arg-type]
        parts: tuple[tuple[int, Literal[0, 1], Literal[0, 1]], ...] = (
            ((1, 0, 0), (-1, 1, 1)) if part == 0 else ((1, 0, 1), (1, 1, 0))
        )
        return [(sign, self._complex_factor(first, one), self._complex_factor(second, other)) for sign, one, other in parts]

    def _complex_factor(self, place: Place, part: Literal[0, 1], before: tuple[Place, ...] = ()) -> Factor:
        chain = (*before, *self.reader.trace(*place))
        node, index = chain[-1]
        if is_call(node, aten.view_as_complex.default):
            source = argument(node, 0, "self")
            return Factor((*chain, *self.chain((source, (*index, Index(part))))))
        return Factor(chain, part)


def _is_one_number(value: torch.Tensor) -> bool:
    """Whether there is one element, without asking a symbol for its value."""
    return all(isinstance(extent, int) and extent == 1 for extent in value.shape)


@dataclass(frozen=True)
class Rotation:
    """A recognised RoPE: out = x turned by the angles whose cosines and sines are `cos` and `sin`, R/2 of each."""

    style: str
    x: tuple[Factor, ...]
    cos: tuple[Factor, ...]
    sin: tuple[Factor, ...]


def find_rotation(columns: Sequence[list[Term]], is_table: Callable[[Factor], bool]) -> Rotation | None:
    """The rotation that R columns are, each given as its products; `is_table` tells cosines and sines from what is turned."""
    half = len(columns) // 2
    if len(columns) % 2 or not half:
        return None
    sums = [_oriented(terms, is_table) for terms in columns]
    for style, pairs in (
        ("gptj", [(2 * i, 2 * i + 1) for i in range(half)]),
        ("neox", [(i, i + half) for i in range(half)]),
    ):
        x: dict[int, Factor] = {}
        cos, sin = [], []
        for a, b in pairs:
            turned = _turned(sums[a], sums[b])
            if turned is None:
                break
            x[a], x[b] = turned[0], turned[1]
            cos.append(turned[2])
            sin.append(turned[3])
        else:
            return Rotation(style, tuple(x[j] for j in range(2 * half)), tuple(cos), tuple(sin))
    return None


def _oriented(terms: list[Term], is_table: Callable[[Factor], bool]) -> list[Term]:
    """Two products, each with what is turned first; none where that is not what the terms are."""
    found = []
    for sign, first, second in terms:
        if is_table(first) == is_table(second):
            return []
        found.append((sign, second, first) if is_table(first) else (sign, first, second))
    return found if len(found) == 2 else []


def _turned(first: list[Term], second: list[Term]) -> tuple[Factor, Factor, Factor, Factor] | None:
    """x_a, x_b, cos, sin where the sums are x_a cos - x_b sin and x_b cos + x_a sin."""
    if sorted(sign for sign, _, _ in first) != [-1, 1] or [sign for sign, _, _ in second] != [1, 1]:
        return None
    (_, x_b, sin), (_, x_a, cos) = sorted(first, key=lambda term: term[0])
    expected = {(x_b.key, cos.key), (x_a.key, sin.key)}
    if x_a.key == x_b.key or {(x.key, table.key) for _, x, table in second} != expected:
        return None
    return x_a, x_b, cos, sin
