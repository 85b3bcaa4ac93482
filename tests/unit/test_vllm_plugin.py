"""The plugin for vLLM where there is no vLLM: it is off, and costs nothing.  tests/vllm has the rest."""

import subprocess
import sys

import pytest

from mlagen.errors import RequestError
from mlagen.integrations.vllm import plugin
from mlagen.integrations.vllm.plugin import IN_GRAPH, IN_LAYER


def test_register_imports_nothing_while_it_is_off():
    code = """
import os, sys
os.environ["MLAGEN_VLLM"] = "0"
from mlagen.integrations.vllm import register
register()
print(*(name for name in ("torch", "vllm", "numpy") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")


@pytest.mark.parametrize(
    ("text", "asked", "route"),
    [
        (None, {}, None),
        ("", {}, None),
        ("0", {}, None),
        ("1", {}, IN_LAYER),
        ("graph", {}, IN_GRAPH),
        (None, {"mlagen": True}, IN_LAYER),
        ("", {"mlagen": True}, IN_LAYER),
        ("", {"mlagen": "graph"}, IN_GRAPH),
        ("config", {"mlagen": True}, IN_LAYER),
        ("config", {"mlagen": "graph"}, IN_GRAPH),
        ("config", {"other": True}, None),
        ("1", {"mlagen": False}, None),
        ("1", {"mlagen": "graph"}, IN_GRAPH),
        ("graph", {"mlagen": True}, IN_GRAPH),
        ("graph", {"mlagen": False}, None),
        ("0", {"mlagen": True}, None),
        ("0", {"mlagen": "graph"}, None),
        ("1", object(), IN_LAYER),
    ],
)
def test_the_switch(monkeypatch, text, asked, route):
    """A model's configuration comes before the variable, but for its 0."""
    if text is None:
        monkeypatch.delenv("MLAGEN_VLLM", raising=False)
    else:
        monkeypatch.setenv("MLAGEN_VLLM", text)
    assert plugin.route_of(asked) == route


def test_other_values_are_refused(monkeypatch):
    monkeypatch.setenv("MLAGEN_VLLM", "true")
    with pytest.raises(RequestError, match="MLAGEN_VLLM='true': expected 0 or 1, or graph"):
        plugin.variable()
    monkeypatch.setenv("MLAGEN_VLLM", "1")
    for value in (1, 0, "true", 1.0):
        with pytest.raises(RequestError, match=f"mlagen is {value!r}, expected true, false or 'graph'"):
            plugin.route_of({"mlagen": value})


@pytest.mark.parametrize(
    ("version", "tested"), [("0.33.0", True), ("0.33.0+rocm723", True), ("0.33.1", False), ("0.34.0rc1", False)]
)
def test_versions(version, tested):
    assert plugin.is_tested(version) is tested
