"""The plugin for vLLM where there is no vLLM: it is off, and costs nothing.  tests/vllm has the rest."""

import subprocess
import sys

import pytest

from mlagen.errors import RequestError
from mlagen.integrations.vllm import plugin
from mlagen.integrations.vllm.deployment import deployment_options
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS


def test_register_imports_nothing_while_it_is_off():
    code = """
import os, sys
os.environ.pop("MLAGEN_VLLM", None)
from mlagen.integrations.vllm import register
register()
print(*(name for name in ("torch", "vllm", "numpy") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")


@pytest.mark.parametrize(("text", "on"), [(None, False), ("", False), ("0", False), ("1", True), ("graph", True)])
def test_the_switch(monkeypatch, text, on):
    if text is None:
        monkeypatch.delenv("MLAGEN_VLLM", raising=False)
    else:
        monkeypatch.setenv("MLAGEN_VLLM", text)
    assert plugin.switched_on() is on


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv("MLAGEN_VLLM", "true")
    with pytest.raises(RequestError, match="MLAGEN_VLLM='true': expected 0 or 1, or graph"):
        plugin.switched_on()


@pytest.mark.parametrize(
    ("version", "tested"), [("0.33.0", True), ("0.33.0+rocm723", True), ("0.33.1", False), ("0.34.0rc1", False)]
)
def test_versions(version, tested):
    assert plugin.is_tested(version) is tested


@pytest.mark.parametrize(("model", "tp", "arch", "kernels"), [("deepseek-r1", 8, "gfx942", 3), ("kimi-linear", 4, "gfx950", 5)])
def test_what_a_deployment_may_need(model, tp, arch, kernels):
    """Each of these is another kernel; few heads may be wanted as a pair, too."""
    found = [PrologueSpec.from_model(model, tp=tp, **each) for each in deployment_options(model, tp, TARGETS[arch])]
    assert len(set(found)) == len(found) == kernels
    assert {each.fp8_max for each in found if each.kv_dtype == "fp8"} == ({224.0} if arch == "gfx942" else {None})
