"""What a bench leaves: CSV, JSON and a picture."""

import csv
import importlib.util
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mlagen.bench.plot import draw, require_plot
from mlagen.bench.report import COLUMNS, Report, csv_text, json_text
from mlagen.bench.run import Row
from mlagen.errors import MlagenError, RequestError

REPORT = Report(
    model="deepseek-r1",
    tp=8,
    heads=16,
    arch="sm_90",
    device="NVIDIA H200, or so",
    torch="2.11",
    mlagen="0.1",
    layers=61,
    repeats=30,
    methods=["empty", "stream", "mlagen", "eager"],
    rows=[
        Row(8, 61, {"empty": 0.5, "stream": 2.0, "mlagen": 2.5, "eager": 60.0}, {}),
        Row(1, 61, {"empty": 0.5, "mlagen": 2.25}, {"stream": "no compiler", "eager": "wrong: all of it"}),
    ],
    left_out={"bmm+aiter": "AMD-only"},
)


def test_csv_has_a_line_for_each_time():
    lines = list(csv.DictReader(io.StringIO(csv_text(REPORT))))
    assert csv_text(REPORT).splitlines()[0] == ",".join(COLUMNS)
    about = {"model": "deepseek-r1", "heads": "16", "device": "NVIDIA H200, or so", "torch": "2.11", "mlagen": "0.1"}
    assert lines[2] == {**about, "tokens": "8", "method": "mlagen", "us_per_layer": "2.5000", "ratio_to_stream": "1.2500"}
    assert [(line["tokens"], line["method"]) for line in lines[4:]] == [("1", "empty"), ("1", "mlagen")]
    assert {line["ratio_to_stream"] for line in lines[4:]} == {""}


def test_json_has_everything():
    found = json.loads(json_text(REPORT))
    assert found["rows"][1]["failures"] == {"stream": "no compiler", "eager": "wrong: all of it"}
    assert found["left_out"] == {"bmm+aiter": "AMD-only"}
    assert set(found) == set(Report.__dataclass_fields__)


@pytest.fixture
def matplotlib():
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib")


def test_a_plot_has_a_line_for_each_method_with_times(matplotlib):
    picture = draw(REPORT, "svg")
    assert picture == draw(REPORT, "svg")
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    texts = [*REPORT.methods, "tokens", "deepseek-r1, 16 heads, NVIDIA H200, or so"]
    assert [text for text in texts if f"<!-- {text} -->" not in picture.decode()] == []


def test_a_plot_as_png(matplotlib):
    assert draw(REPORT, "png").startswith(b"\x89PNG")
    assert require_plot(Path("a.b/c.PNG")) == "png"


@pytest.mark.parametrize("path", ["plot", "plot.pdf", "plot.svg/x", ".svg"])
def test_a_plot_of_another_format(path):
    with pytest.raises(RequestError, match=r"must end in \.svg or \.png"):
        require_plot(Path(path))


def test_a_plot_without_matplotlib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MlagenError, match=r"^--plot needs matplotlib, which is not installed: pip install 'mlagen\[bench\]'$"):
        require_plot(Path("plot.svg"))
