"""How the plugin gets in: found by vLLM, switched on by a variable, loaded as often as vLLM likes."""

import functools
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
ARCH = os.environ.get("VLLM_TEST_ARCH", "gfx950")

once = pytest.mark.usefixtures("once")

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
for additional in eval(sys.argv[2]):
    model = vllm_toy.Model(vllm_toy.Options(additional=additional))
    wraps = "process_weights_after_loading" in vars(model.attentions[0])
    print(type(model.module.layers[0]).__name__, sorted(op_registry_oot), len(CompilationConfig._attention_ops), wraps)
"""


LIGHT = """
import sys
import fake_rocm
fake_rocm.become(sys.argv[1])
import vllm.engine.arg_utils
from vllm import plugins
plugins.load_general_plugins()
print([name for name in ("vllm.model_executor.layers.mla", "mlagen.runtime") if name in sys.modules])
"""


STOCK = "MultiHeadLatentAttentionWrapper [] "
OURS = "MlagenMultiHeadLatentAttentionWrapper ['MultiHeadLatentAttentionWrapper'] "


@functools.cache
def run(program=PROGRAM, additional="[{}]", **variables):
    """What it prints, and what it says in the log; `additional` are vLLM's --additional-config, of a model each."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLAGEN_VLLM", "VLLM_"))}
    path = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests", ROOT)))}
    command = [sys.executable, "-c", program, ARCH, additional]
    done = subprocess.run(command, env={**kept, **path, **variables}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), [line for line in (done.stdout + done.stderr).splitlines() if "mlagen:" in line]


def test_vllm_finds_it():
    (point,) = (each for each in importlib.metadata.entry_points(group="vllm.general_plugins") if each.name == "mlagen")
    from mlagen.integrations.vllm import register

    assert point.load() is register


OFF = {
    "not set": {"additional": "[{}, {'mlagen': False}]"},
    "0": {"MLAGEN_VLLM": "0", "additional": "[{}, {'mlagen': True}]"},
    "left out": {"MLAGEN_VLLM": "1", "VLLM_PLUGINS": "another"},
}


@once
@pytest.mark.parametrize("name", OFF)
def test_off(name):
    """Nothing is replaced and nothing said."""
    printed, said = run(**OFF[name])
    models = [line for line in printed if "Wrapper" in line]
    assert len(models) == OFF[name].get("additional", "{").count("{")
    assert all(line.startswith(STOCK) and line.endswith(" False") for line in models)
    assert not said


@pytest.mark.host
def test_on_and_loaded_twice():
    """Also for a second model; a third one's configuration says no: its layer is ours, and does what vLLM's does.

    What a fourth one's says is no answer.
    """
    from vllm.config import CompilationConfig

    splits = len([each for each in CompilationConfig._attention_ops if "mlagen" not in each])
    printed, said = run(additional="[{}, {}, {'mlagen': False}, {'mlagen': 'yes'}]", MLAGEN_VLLM="1")
    models = [line for line in printed if "Wrapper" in line]
    assert models == [f"{OURS}{splits + 1} {wraps}" for wraps in (True, True, False, False)]
    building, fused, refused = said
    assert "loading or building the kernel of model.layers.0.self_attn.attn" in building
    assert "decode of model.layers.0.self_attn.attn, and of every layer like it, is fused" in fused
    assert ARCH in fused
    assert "additional_config: mlagen is 'yes', expected true, false or 'graph'" in refused


WORKER = """
import pickle, sys
import fake_rocm
fake_rocm.become(sys.argv[1])
from vllm import plugins
configs = pickle.load(sys.stdin.buffer)
plugins.load_general_plugins()
import torch
import vllm_toy
from vllm.config import set_current_vllm_config
torch.set_default_dtype(torch.bfloat16)
for config in configs:
    with set_current_vllm_config(config):
        (layer, _) = vllm_toy.Layers(vllm_config=config, options=vllm_toy.Options()).layers
    print("worker:", type(layer).__name__, "process_weights_after_loading" in vars(layer.mla_attn), flush=True)
"""

PARENT = """
import os, pickle, subprocess
configs = [model.config, vllm_toy.Model(vllm_toy.Options()).config]
for config in configs:
    config.compilation_config.static_forward_context.clear()
subprocess.run([sys.executable, "-c", os.environ["WORKER"], sys.argv[1]], input=pickle.dumps(configs), check=True)
print(os.environ["MLAGEN_VLLM"])
"""


@once
@pytest.mark.host
def test_on_by_a_models_configuration():
    """And so in the processes that vLLM starts, which get the configuration ready-made; off for another model in all of them."""
    printed, said = run(PROGRAM + PARENT, additional="[{'mlagen': True}]", WORKER=WORKER)
    assert [line for line in printed if line.startswith(OURS)]
    workers = [line for line in printed if line.startswith("worker:")]
    assert workers == [f"worker: {OURS.split()[0]} {wraps}" for wraps in (True, False)]
    assert printed[-1] == "config"
    assert ["is fused" in line for line in said] == [False, True]


@once
def test_a_configuration_with_another_value():
    """Where nothing else asks for the plugin."""
    printed, (line,) = run(additional="[{'mlagen': 'yes'}]")
    assert printed[-1].startswith(STOCK)
    assert "additional_config: mlagen is 'yes', expected true, false or 'graph'" in line


@once
def test_loading_it_imports_none_of_vllms_layers():
    """Processes that pass requests on, or that have yet to fork, have no use for them."""
    printed, _ = run(LIGHT, MLAGEN_VLLM="1")
    assert printed[-1] == "[]"


IN_GRAPHS = (
    PROGRAM.replace("Options(", "Options(mode=3, config={'splitting_ops': []}, ")
    + """
print([each.decodes_in_layer for each in model.module.layers], [each.mlagen.fits for each in model.attentions])
print(model.config.compilation_config.compile_ranges_endpoints, model.config.scheduler_config.max_num_seqs)
"""
)


@once
@pytest.mark.host
@pytest.mark.parametrize("switch", [{"MLAGEN_VLLM": "graph"}, {"additional": "[{'mlagen': 'graph'}]"}])
def test_on_in_graphs(switch):
    """The layer calls what vLLM's calls, and its weights are there."""
    printed, said = run(IN_GRAPHS, **switch)
    assert printed[-3].startswith(OURS)
    assert printed[-2:] == ["[False, False] [True, True]", "[128, 2048] 128"]
    assert len(said) == 2


@once
def test_a_version_that_was_not_tested():
    program = "from mlagen.integrations.vllm import plugin; plugin.TESTED = ('0.32.0',)\n" + PROGRAM
    printed, said = run(program, MLAGEN_VLLM="1")
    assert printed[-1].startswith(STOCK)
    (line,) = said
    assert "vLLM 0.33.0 was not tested" in line
    assert "0.32.0" in line


@once
def test_a_value_that_is_none():
    printed, said = run(MLAGEN_VLLM="yes")
    assert printed[-1].startswith(STOCK)
    (line,) = said
    assert "MLAGEN_VLLM='yes': expected 0 or 1, or graph" in line


@once
def test_another_plugin_was_first():
    first = """
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper as Wrapper
Wrapper.register_oot(type("Theirs", (Wrapper,), {}))
"""
    printed, said = run(PROGRAM.replace("from vllm import plugins\n", f"{first}from vllm import plugins\n"), MLAGEN_VLLM="1")
    assert printed[-1].startswith("Theirs ")
    (line,) = said
    assert "another plugin has replaced vLLM's MLA layer" in line


@once
def test_doctor():
    """It tells of the plugin without importing vLLM."""
    program = """
import sys
from mlagen import doctor
found = doctor._vllm()
print(found.works, found.detail, "|", found.remedy)
assert "vllm" not in sys.modules and "torch" not in sys.modules
"""
    off = "True vLLM 0.33.0, mlagen is off; MLAGEN_VLLM=1 switches it on"
    assert run(program)[0] == [f"{off}, and so does --additional-config '{{\"mlagen\": true}}' | "]
    assert run(program, MLAGEN_VLLM="0")[0] == [f"{off} | "]
    assert run(program, MLAGEN_VLLM="1")[0] == [
        "True vLLM 0.33.0, mlagen is on; its log says for each model whether decode is fused | "
    ]
    assert run(program, MLAGEN_VLLM="1", VLLM_PLUGINS="a,b")[0] == [
        "False vLLM 0.33.0 leaves mlagen out: VLLM_PLUGINS=a,b | unset VLLM_PLUGINS, or name mlagen in it"
    ]
    assert run(program, MLAGEN_VLLM="yes")[0] == ["False vLLM 0.33.0, mlagen is off | MLAGEN_VLLM='yes': expected 0 or 1, or graph"]
