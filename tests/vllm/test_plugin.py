"""How the plugin gets in: found by vLLM, switched on by a variable, loaded as often as vLLM likes."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
ARCH = os.environ.get("VLLM_TEST_ARCH", "gfx950")

PROGRAM = """
import sys
import fake_rocm
fake_rocm.become(sys.argv[1])
from vllm import plugins
plugins.load_general_plugins()
plugins.plugins_loaded = False
plugins.load_general_plugins()
from vllm.config import CompilationConfig, LoggingConfig
from vllm.logger import configure_logging
from vllm.model_executor.custom_op import op_registry_oot
import vllm_toy
configure_logging(LoggingConfig())  # as vLLM's engine does
model = vllm_toy.Model(vllm_toy.Options())
print(type(model.module.layers[0]).__name__, sorted(op_registry_oot), len(CompilationConfig._attention_ops))
"""


def run(program=PROGRAM, **variables):
    """What it prints, and what it says in the log."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLAGEN_VLLM", "VLLM_"))}
    path = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests", ROOT)))}
    command = [sys.executable, "-c", program, ARCH]
    done = subprocess.run(command, env={**kept, **path, **variables}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), [line for line in (done.stdout + done.stderr).splitlines() if "mlagen:" in line]


def test_vllm_finds_it():
    (point,) = (each for each in importlib.metadata.entry_points(group="vllm.general_plugins") if each.name == "mlagen")
    from mlagen.integrations.vllm import register

    assert point.load() is register


@pytest.mark.parametrize("variables", [{}, {"MLAGEN_VLLM": "0"}, {"MLAGEN_VLLM": "1", "VLLM_PLUGINS": "another"}])
def test_off(variables):
    """Nothing is replaced and nothing said."""
    printed, said = run(**variables)
    assert printed[-1].startswith("MultiHeadLatentAttentionWrapper [] ")
    assert not said


@pytest.mark.host
def test_on_and_loaded_twice():
    off, on = run(), run(MLAGEN_VLLM="1")
    assert on[0][-1].startswith("MlagenMultiHeadLatentAttentionWrapper ['MultiHeadLatentAttentionWrapper'] ")
    assert int(on[0][-1].split()[-1]) == int(off[0][-1].split()[-1]) + 1
    (line,) = on[1]
    assert "decode of model.layers.0.self_attn.attn, and of every layer like it, is fused" in line
    assert ARCH in line


@pytest.mark.host
def test_on_in_graphs():
    """The layer's forward is vLLM's, and its weights are there."""
    options = "Options(mode=3, config={'splitting_ops': []})"
    facts = "type(model.module.layers[0]).forward is vllm_toy.MultiHeadLatentAttentionWrapper.forward"
    weights = "[each.mlagen is not None for each in model.attentions]"
    ends = "model.config.compilation_config.compile_ranges_endpoints, model.config.scheduler_config.max_num_seqs"
    program = PROGRAM.replace("Options()", options) + f"print({facts}, {weights}, {ends})\n"
    printed, said = run(program, MLAGEN_VLLM="graph")
    assert printed[-2].startswith("MlagenMultiHeadLatentAttentionWrapper ['MultiHeadLatentAttentionWrapper'] ")
    assert printed[-1] == "True [True, True] [128, 2048] 128"
    assert len(said) == 1


def test_a_version_that_was_not_tested():
    program = "from mlagen.integrations.vllm import plugin; plugin.TESTED = ('0.32.0',)\n" + PROGRAM
    printed, said = run(program, MLAGEN_VLLM="1")
    assert printed[-1].startswith("MultiHeadLatentAttentionWrapper [] ")
    (line,) = said
    assert "vLLM 0.33.0 was not tested" in line
    assert "0.32.0" in line


def test_a_value_that_is_none():
    printed, said = run(MLAGEN_VLLM="yes")
    assert printed[-1].startswith("MultiHeadLatentAttentionWrapper [] ")
    (line,) = said
    assert "MLAGEN_VLLM='yes': expected 0 or 1" in line


def test_another_plugin_was_first():
    first = """
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper as Wrapper
Wrapper.register_oot(type("Theirs", (Wrapper,), {}))
"""
    printed, said = run(PROGRAM.replace("from vllm import plugins\n", f"{first}from vllm import plugins\n"), MLAGEN_VLLM="1")
    assert printed[-1].startswith("Theirs ")
    (line,) = said
    assert "another plugin has replaced vLLM's MLA layer" in line


def test_doctor():
    """It tells of the plugin without importing vLLM."""
    program = """
import sys
from mlagen import doctor
found = doctor._vllm()
print(found.works, found.detail, "|", found.remedy)
assert "vllm" not in sys.modules and "torch" not in sys.modules
"""
    assert run(program)[0] == ["True vLLM 0.33.0, mlagen is off; MLAGEN_VLLM=1 switches it on | "]
    assert run(program, MLAGEN_VLLM="1")[0] == [
        "True vLLM 0.33.0, mlagen is on; its log says for each model whether decode is fused | "
    ]
    assert run(program, MLAGEN_VLLM="1", VLLM_PLUGINS="a,b")[0] == [
        "False vLLM 0.33.0 leaves mlagen out: VLLM_PLUGINS=a,b | unset VLLM_PLUGINS, or name mlagen in it"
    ]
    assert run(program, MLAGEN_VLLM="yes")[0] == ["False vLLM 0.33.0, mlagen is off | MLAGEN_VLLM='yes': expected 0 or 1"]
