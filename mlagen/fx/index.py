"""Where an element is: indices that are sums of variables, and what reshaping does to them.

The passes do not compare graphs with patterns.  They ask which element of which tensor a given element of a result is, and an index
such as (t, h, 96 + j) follows it through views, whatever their order and spelling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Size = object
"""An extent: an int, or a torch.SymInt, whose value is never asked for."""


@dataclass(frozen=True)
class Index:
    """const + the sum of coefficient * variable; every coefficient is positive."""

    const: int = 0
    terms: tuple[tuple[str, int], ...] = ()

    def __add__(self, other: "Index | int") -> "Index":
        if isinstance(other, int):
            return Index(self.const + other, self.terms)
        terms = dict(self.terms)
        for name, coefficient in other.terms:
            terms[name] = terms.get(name, 0) + coefficient
        return Index(self.const + other.const, tuple(sorted(terms.items())))

    def scaled(self, factor: int) -> "Index":
        return Index(self.const * factor, tuple((name, coefficient * factor) for name, coefficient in self.terms if factor))

    @property
    def variable(self) -> str | None:
        """The name, where this is one variable plus a constant."""
        return self.terms[0][0] if len(self.terms) == 1 and self.terms[0][1] == 1 else None


class Unreadable(Exception):
    """An element that the reader cannot follow; the words say where and why."""


class OtherForm(Unreadable):
    """A known operator, called in a form that is not the one that is known."""


def largest(index: Index, sizes: Mapping[str, int | None]) -> int | None:
    """The largest value, or None where a variable has no known bound."""
    total = index.const
    for name, coefficient in index.terms:
        size = sizes[name]
        if size is None:
            return None
        total += coefficient * (size - 1)
    return total


def within(place: Index, first: int, end: int, sizes: Mapping[str, int | None]) -> bool:
    """Whether all values of an index are in a range.  Raises Unreadable where some are."""
    last = largest(place, sizes)
    if last is not None and place.const >= first and last < end:
        return True
    if place.const < end and (last is None or last >= first):
        raise Unreadable("columns that come from more than one tensor")
    return False


def divide(index: Index, stride: int, sizes: Mapping[str, int | None]) -> tuple[Index, Index]:
    """Quotient and remainder by `stride`, for all values of the variables.  Raises Unreadable where these are no such sums."""
    whole = tuple((name, coefficient // stride) for name, coefficient in index.terms if coefficient % stride == 0)
    rest = Index(index.const % stride, tuple(term for term in index.terms if term[1] % stride))
    bound = largest(rest, sizes)
    if bound is None or bound >= stride:
        raise Unreadable(f"an index that a view of rows of {stride} breaks up")
    return Index(index.const // stride, whole), rest


def reshaped(index: Sequence[Index], shape: Sequence[Size], into: Sequence[Size], sizes: Mapping[str, int | None]) -> list[Index]:
    """The index in a tensor of extents `into` of the element at `index` in one of extents `shape`, both in the same order.

    Equal extents at both ends keep their index; what is between is counted through.  Raises Unreadable.
    """
    places, extents, wanted = list(index), list(shape), list(into)
    ends: dict[int, list[Index]] = {-1: [], 0: []}
    for end, found in ends.items():
        while extents or wanted:
            if extents and _is_one(extents[end]):
                del places[end], extents[end]
            elif wanted and _is_one(wanted[end]):
                wanted.pop(end)
                found.append(Index())
            elif extents and wanted and same_extent(extents[end], wanted[end]):
                found.append(places.pop(end))
                del extents[end], wanted[end]
            else:
                break
    return ends[0] + _regroup(places, extents, wanted, sizes) + ends[-1][::-1]


def _regroup(index: Sequence[Index], shape: Sequence[Size], into: Sequence[Size], sizes: Mapping[str, int | None]) -> list[Index]:
    linear = Index()
    for place, stride in zip(index, _strides(shape), strict=True):
        if place != Index():
            if stride is None:
                raise Unreadable("a view that moves columns across a symbol")
            linear = linear + place.scaled(stride)
    result = []
    for stride in _strides(into):
        if stride is None:
            raise Unreadable("a view with two symbols")
        quotient, linear = divide(linear, stride, sizes)
        result.append(quotient)
    if linear != Index():
        raise Unreadable("a view that drops part of an index")
    return result


def _strides(shape: Sequence[Size]) -> list[int | None]:
    """The contiguous strides; None left of a symbol."""
    strides: list[int | None] = []
    stride: int | None = 1
    for extent in reversed(shape):
        strides.append(stride)
        stride = stride * extent if stride is not None and isinstance(extent, int) else None
    return strides[::-1]


def same_extent(first: Size, second: Size) -> bool:
    """Whether two extents are known to be equal, without asking a symbol for its value."""
    return first == second if isinstance(first, int) and isinstance(second, int) else str(first) == str(second)


def _is_one(extent: Size) -> bool:
    return isinstance(extent, int) and extent == 1


def may_be_same(first: Size, second: Size) -> bool:
    """Whether extents that an operator needs to be equal are: two symbols are, since neither is 1, which would be repeated."""
    return same_extent(first, second) or not (isinstance(first, int) or isinstance(second, int))
