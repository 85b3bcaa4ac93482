"""vLLM as if on the GPU that VLLM_TEST_ARCH names: one for a process, since vLLM asks while it is imported."""

import importlib
import os
from collections.abc import Callable
from types import ModuleType

import pytest

ARCH = os.environ.get("VLLM_TEST_ARCH", "gfx950")


@pytest.fixture(scope="session")
def once() -> None:
    """For tests of what does not depend on the architecture, and takes processes or compilers: they run on one of them."""
    if ARCH != "gfx950":
        pytest.skip("does not depend on the architecture: runs on gfx950")


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """vllm_toy, which imports vLLM."""
    import fake_rocm

    os.environ.update(VLLM_PLUGINS="", VLLM_DISABLE_COMPILE_CACHE="1", VLLM_USE_AOT_COMPILE="0")
    fake_rocm.become(ARCH)
    return importlib.import_module("vllm_toy")


@pytest.fixture
def build(toy, monkeypatch) -> Callable:
    """build(options, plugin=...): a model, with or without the plugin.  build.decodes: layers that decoded through it."""
    from vllm.model_executor import custom_op

    from mlagen.integrations.vllm import decode, log, prologue, register

    monkeypatch.setenv("MLAGEN_VLLM", "1")
    register()
    replaced = custom_op.op_registry_oot
    assert replaced, "register() replaces the layer"
    monkeypatch.setattr(log, "_SAID", set())
    monkeypatch.setattr(prologue, "_ANNOUNCED", set())
    monkeypatch.setattr(prologue, "_FAILED", {})

    def build_(options, *, plugin: bool = True):
        monkeypatch.setattr(custom_op, "op_registry_oot", replaced if plugin else {})
        return toy.Model(options)

    run, build_.decodes = decode.Decode.run, []

    def counted(self, attn, *arguments):
        build_.decodes.append(attn.layer_name)
        run(self, attn, *arguments)

    monkeypatch.setattr(decode.Decode, "run", counted)
    return build_


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the plugin says in vLLM's log."""
    from mlagen.integrations.vllm.log import logger

    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logger(), level, lambda text, *values, **_: lines.append(text % values))
    return lines
