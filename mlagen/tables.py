"""Tables: which layout for how many tokens, as `mlagen tune` found it out, for the shapes that it was asked about.

A shape that no table has takes the ranges of the nearest one: the nearest L, P, bits of a weight and number of heads, in this
order.  A table is a JSON file; those of the package are in mlagen/tuned/.  MLAGEN_TABLES names more, which come first where
several are equally near.
"""

import functools
import json
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from mlagen.errors import RequestError, ScheduleError
from mlagen.layout import Layout
from mlagen.lowering import Lowered, lower
from mlagen.schedule import lay_out
from mlagen.spec import PrologueSpec
from mlagen.target import Target

WIDE_WEIGHT = 16
"""Bits of an element of W_UK in the model's dtype: those of an entry that does not say."""

FORMAT = 1
"""Raised when the meaning of a table's fields changes."""


@dataclass(frozen=True)
class Range:
    """Up to `tokens` tokens (None: any number) `layout` is used, with `token_tiles` tiles of tokens for each absorb workgroup.

    None leaves their number to the schedule's rule.
    """

    tokens: int | None
    layout: Layout
    token_tiles: int | None = None


@dataclass(frozen=True)
class Entry:
    """The ranges of one shape, by rising numbers of tokens; the last one has no end.  `weight_bits` are an element's of W_UK.

    Their layouts have one m_tiles: all kernels of a shape read the same packed weights.
    `found` is what a measurement gave, for readers: for each number of tokens the microseconds per layer of what is used there, and
    those of the streaming floor in the same run.
    """

    nope_dim: int
    lora_rank: int
    heads: int
    dependent: bool
    ranges: tuple[Range, ...]
    found: Mapping[str, Sequence[float]] = field(default_factory=dict, compare=False)
    weight_bits: int = WIDE_WEIGHT

    def __post_init__(self) -> None:
        ends = [math.inf if each.tokens is None else each.tokens for each in self.ranges]
        if not ends or ends[-1] != math.inf or ends != sorted(set(ends)):
            raise RequestError(f"ranges that end at {ends}: they must rise, and the last must have no end (null)")
        if len({each.layout.m_tiles for each in self.ranges}) > 1:
            raise RequestError("ranges with several m_tiles: all kernels of a shape read weights that are packed for one")

    @property
    def m_tiles(self) -> int | None:
        return self.ranges[0].layout.m_tiles

    def distance(self, spec: PrologueSpec, weight_bits: int) -> tuple[float, ...]:
        """How far a spec with weights of so many bits is from this one, the most important first."""
        theirs = (spec.lora_rank, spec.nope_dim, weight_bits, spec.heads)
        ours = (self.lora_rank, self.nope_dim, self.weight_bits, self.heads)
        return tuple(abs(math.log2(one / other)) for one, other in zip(ours, theirs, strict=True))


def why_untuned(spec: PrologueSpec) -> str:
    """Why no table concerns the kernels of `spec`; "" where one may."""
    if not spec.absorbs:
        return f"weight={spec.weight!r}: a table chooses how the absorb is done"
    return "q_scaling='token': a table's layouts do not make whole rows" if spec.q_scaling == "token" else ""


def choose_ranges(spec: PrologueSpec, target: Target, *, dependent: bool = False) -> tuple[Range, ...]:
    """The ranges for `spec` on `target`: those of the nearest shape of a table, each with a layout that fits the shape.

    Raises ScheduleError where the target starts no dependent kernels, RequestError for a table that cannot be read.
    """
    if dependent and not target.dependent_launch:
        raise ScheduleError(f"{target.arch} starts no kernel before the one before it has ended: leave pdl out")
    default = replace(base_layout(spec, target), dependent=dependent)
    nearest = _nearest(spec, target, dependent=dependent)
    if nearest is None:
        return (Range(None, default),)
    lowered = lower(spec.program(target))
    fitting: list[Range] = []
    for each in nearest.ranges:
        layout, tiles = replace(each.layout, m_tiles=default.m_tiles), each.token_tiles
        if not _fits(lowered, target, layout):
            layout, tiles = default, None
        if fitting and (fitting[-1].layout, fitting[-1].token_tiles) == (layout, tiles):
            fitting.pop()
        fitting.append(Range(each.tokens, layout, tiles))
    return tuple(fitting)


def base_layout(spec: PrologueSpec, target: Target) -> Layout:
    """The default layout with what all layouts of `spec` have in common: how its weights are packed."""
    nearest = _nearest(spec, target, dependent=False)
    if nearest is None or nearest.m_tiles is None:
        return Layout()
    layout = Layout(m_tiles=nearest.m_tiles)
    return layout if _fits(lower(spec.program(target)), target, layout) else Layout()


def _nearest(spec: PrologueSpec, target: Target, *, dependent: bool) -> Entry | None:
    """The entry of the shape that is nearest to a spec's; None where no table concerns it."""
    if why_untuned(spec):
        return None
    entries = [entry for entry in _entries(target.arch, os.environ.get("MLAGEN_TABLES", "")) if entry.dependent == dependent]
    weight_bits = spec.weight_bits(target)
    return min(entries, key=lambda entry: entry.distance(spec, weight_bits), default=None)


def _fits(lowered: Lowered, target: Target, layout: Layout) -> bool:
    try:
        lay_out(lowered, target, layout)
    except ScheduleError:
        return False
    return True


@functools.cache
def _entries(arch: str, named: str) -> tuple[Entry, ...]:
    """The entries of all tables for `arch`, those of the files that `named` lists first."""
    tables = read_tables(named)
    shipped = resources.files("mlagen").joinpath("tuned") / f"{arch}.json"
    if shipped.is_file():
        tables.append(read_table(shipped.read_text(encoding="utf-8"), f"mlagen/tuned/{arch}.json"))
    return tuple(entry for found, entries in tables if found == arch for entry in entries)


def read_tables(named: str) -> list[tuple[str, tuple[Entry, ...]]]:
    """Arch and entries of each table in a list of paths as MLAGEN_TABLES holds it.  Raises RequestError."""
    tables = []
    for path in filter(None, named.split(os.pathsep)):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise RequestError(f"MLAGEN_TABLES: {path} cannot be read ({why}); name tables that `mlagen tune` wrote") from None
        tables.append(read_table(text, path))
    return tables


def read_table(text: str, name: str) -> tuple[str, tuple[Entry, ...]]:
    """Arch and entries of a table; `name` is for the errors.  Raises RequestError for anything else than a table."""
    try:
        table = json.loads(text)
        if table["format"] != FORMAT:
            raise RequestError(f"it has format {table['format']}, this mlagen reads {FORMAT}")
        return str(table["arch"]), tuple(_entry(each) for each in table["entries"])
    except RequestError as error:
        why = str(error)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
    raise RequestError(f"{name}: not a table that this mlagen can use ({why}); write it again with `mlagen tune`")


def table_source(text: str) -> str:
    """Where a table that read_table accepts comes from."""
    return str(json.loads(text).get("source", ""))


def _entry(fields: Mapping[str, Any]) -> Entry:
    dependent = fields["dependent"]
    if not isinstance(dependent, bool):
        raise RequestError(f"dependent={dependent!r}: must be true or false")
    m_tiles = _count(fields, "m_tiles") if "m_tiles" in fields else None
    ranges = tuple(
        Range(
            _count_or_null(each, "tokens"),
            Layout(_count(each, "waves"), _count_or_null(each, "block"), dependent, m_tiles),
            _count_or_null(each, "token_tiles"),
        )
        for each in fields["ranges"]
    )
    nope_dim, lora_rank, heads = (_count(fields, name) for name in ("nope_dim", "lora_rank", "heads"))
    weight_bits = _count(fields, "weight_bits") if "weight_bits" in fields else WIDE_WEIGHT
    return Entry(nope_dim, lora_rank, heads, dependent, ranges, fields.get("found", {}), weight_bits)


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise RequestError(f"{name}={reprlib.repr(value)}: must be a whole number from 1 to {2**31 - 1}")
    return value


def _count_or_null(fields: Mapping[str, Any], name: str) -> int | None:
    return None if fields[name] is None else _count(fields, name)


def write_table(arch: str, source: str, entries: Sequence[Entry]) -> str:
    """The text of a table.  `source` says where it comes from: measured on which device, or modelled."""
    rows = []
    for entry in entries:
        ranges = [
            {
                "tokens": each.tokens,
                "waves": each.layout.waves_per_workgroup,
                "block": each.layout.block,
                "token_tiles": each.token_tiles,
            }
            for each in entry.ranges
        ]
        row: dict[str, Any] = {name: getattr(entry, name) for name in ("nope_dim", "lora_rank", "heads", "dependent")}
        row |= {"weight_bits": entry.weight_bits} if entry.weight_bits != WIDE_WEIGHT else {}
        row |= {"m_tiles": entry.m_tiles} if entry.m_tiles is not None else {}
        row |= {"ranges": ranges} | ({"found": entry.found} if entry.found else {})
        rows.append("    " + json.dumps(row))
    head = {"format": FORMAT, "arch": arch, "source": source}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    return "{\n" + "\n".join([*lines, '  "entries": [\n' + ",\n".join(rows) + "\n  ]"]) + "\n}\n"
