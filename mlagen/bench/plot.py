"""The plot: microseconds per layer over tokens, a line for each method."""

import importlib
import importlib.util
import io
from pathlib import Path
from typing import Any

from mlagen.bench.report import Report
from mlagen.bench.run import EMPTY, OWN, STREAM
from mlagen.errors import MlagenError, RequestError

FORMATS = ("svg", "png")

_SIZE_INCHES = (9, 6)
_STYLES: dict[str, dict[str, Any]] = {
    OWN: {"color": "black", "linewidth": 2.5, "zorder": 3},
    STREAM: {"color": "grey", "linestyle": "--"},
    EMPTY: {"color": "grey", "linestyle": ":"},
}


def require_plot(path: Path) -> str:
    """The format that a plot's file name asks for.

    Raises RequestError for another ending than FORMATS, MlagenError where matplotlib is missing.
    """
    ending = path.suffix[1:].lower()
    if ending not in FORMATS:
        raise RequestError(f"--plot {path}: must end in {' or '.join(f'.{each}' for each in FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MlagenError("--plot needs matplotlib, which is not installed: pip install 'mlagen[bench]'")
    return ending


def draw(report: Report, ending: str) -> bytes:
    """The picture as a file of the given format; the same report gives the same bytes."""
    matplotlib: Any = importlib.import_module("matplotlib")
    figures: Any = importlib.import_module("matplotlib.figure")
    tickers: Any = importlib.import_module("matplotlib.ticker")
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mlagen"}):
        figure = figures.Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.subplots()
        rows = sorted(report.rows, key=lambda row: row.tokens)
        for method in report.methods:
            points = [(row.tokens, row.us[method]) for row in rows if method in row.us]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method, **_STYLES.get(method, {}))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row.tokens for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(tickers.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(tickers.FormatStrFormatter("%g"))
        axes.grid(alpha=0.3)
        axes.set(xlabel="tokens", ylabel="microseconds per layer", title=f"{report.model}, {report.heads} heads, {report.device}")
        figure.legend(loc="outside right upper")
        figure.savefig(file, format=ending, metadata={"Date": None} if ending == "svg" else None)
    return file.getvalue()
