"""The plugin for vLLM where there is no vLLM: it is off, and costs nothing.  tests/vllm has the rest."""

import subprocess
import sys

import pytest

from mlagen.errors import RequestError
from mlagen.integrations.vllm import plugin


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
    ("text", "asked", "wanted"),
    [
        (None, {}, False),
        ("", {}, False),
        ("0", {}, False),
        ("1", {}, True),
        (None, {"mlagen": True}, True),
        ("", {"mlagen": True}, True),
        ("config", {"mlagen": True}, True),
        ("config", {"other": True}, False),
        ("1", {"mlagen": False}, False),
        ("0", {"mlagen": True}, False),
        ("1", object(), True),
    ],
)
def test_the_switch(monkeypatch, text, asked, wanted):
    """A model's configuration comes before the variable, but for its 0."""
    if text is None:
        monkeypatch.delenv("MLAGEN_VLLM", raising=False)
    else:
        monkeypatch.setenv("MLAGEN_VLLM", text)
    assert plugin.is_wanted(asked) is wanted


def test_other_values_are_refused(monkeypatch):
    monkeypatch.setenv("MLAGEN_VLLM", "true")
    with pytest.raises(RequestError, match="MLAGEN_VLLM='true': expected 0 or 1"):
        plugin.variable()
    monkeypatch.setenv("MLAGEN_VLLM", "1")
    for value in (1, 0, "true", 1.0):
        with pytest.raises(RequestError, match=f"mlagen is {value!r}, expected true or false"):
            plugin.is_wanted({"mlagen": value})


@pytest.mark.parametrize(
    ("version", "tested"), [("0.33.0", True), ("0.33.0+rocm723", True), ("0.33.1", False), ("0.34.0rc1", False)]
)
def test_versions(version, tested):
    assert plugin.is_tested(version) is tested
