"""What the passes did to a graph, and why not more: a record for each site, for the log and for `mlagen explain-graph`."""

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import fx

FRAME = re.compile(r'File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<code>[^\n]*)')


@dataclass(frozen=True)
class Site:
    """A node that the passes looked at: `outcome` is "fused", "lifted" or "left".

    other: the cache update of a query, or the query that a cache update was held against.  source: the line of the model that the
    node is from, where torch knows it.
    """

    node: str
    outcome: str
    detail: str
    other: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        if self.outcome == "left":
            return f"{self.node}: left as it is{f', not with {self.other}' if self.other else ''}: {self.detail}"
        return f"{self.node}{f' and {self.other}' if self.other else ''}: {self.outcome} as {self.detail}"


@dataclass(frozen=True)
class GraphReport:
    """What a pass did to a graph, in `seconds`."""

    name: str
    changed: int
    nodes_before: int
    nodes_after: int
    seconds: float
    sites: tuple[Site, ...] = field(default=())


Record = TypeVar("Record")
_sites: list[list[Site]] = []
_reports: list[list[GraphReport]] = []


@contextlib.contextmanager
def _collected(lists: list[list[Record]]) -> Iterator[list[Record]]:
    found: list[Record] = []
    lists.append(found)
    try:
        yield found
    finally:
        lists[:] = [each for each in lists if each is not found]


def collected_sites() -> contextlib.AbstractContextManager[list[Site]]:
    """The sites that are told of in this context."""
    return _collected(_sites)


def collected_reports() -> contextlib.AbstractContextManager[list[GraphReport]]:
    """The reports of all graphs that a pass in Inductor looks at in this context."""
    return _collected(_reports)


def tell(
    logger: logging.Logger, node: fx.Node, outcome: str, detail: object, other: fx.Node | None = None, level: int = logging.DEBUG
) -> None:
    """Log what became of a site, and record it."""
    site = Site(node.name, outcome, str(detail), other.name if other is not None else None, source_of(node))
    logger.log(level, "%s", site)
    for each in _sites:
        each.append(site)


def publish(report: GraphReport) -> None:
    for each in _reports:
        each.append(report)


def source_of(node: fx.Node) -> str | None:
    """The innermost line of the model that a node is from, "file:line in function: code"."""
    frames = list(FRAME.finditer(node.meta.get("stack_trace") or ""))
    return "{file}:{line} in {function}: {code}".format(**frames[-1].groupdict()) if frames else None
