"""What a bench found, and the same as text for other programs: CSV and JSON."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from mlagen.bench.run import STREAM, Row

COLUMNS = ("model", "heads", "tokens", "method", "us_per_layer", "ratio_to_stream", "device", "torch", "mlagen")


@dataclass(frozen=True)
class Report:
    """A bench of one model on one GPU.

    `methods` are the names of those that were to be measured, in order; `left_out` gives the reason for each peer that was not.
    `layers` is the number of launches in a graph, `repeats` that of the replays behind a median; `torch` and `mlagen` are versions.
    """

    model: str
    tp: int
    heads: int
    arch: str
    device: str
    torch: str
    mlagen: str
    layers: int
    repeats: int
    methods: Sequence[str]
    rows: Sequence[Row]
    left_out: Mapping[str, str]


def csv_text(report: Report) -> str:
    """A line for each time, with COLUMNS; the ratio is empty where the streaming floor has no time."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in report.rows:
        floor = row.us.get(STREAM)
        for method, us in row.us.items():
            ratio = f"{us / floor:.4f}" if floor else ""
            about = (report.device, report.torch, report.mlagen)
            writer.writerow((report.model, report.heads, row.tokens, method, f"{us:.4f}", ratio, *about))
    return text.getvalue()


def json_text(report: Report) -> str:
    """Everything that the report holds."""
    return json.dumps(asdict(report), indent=1) + "\n"
