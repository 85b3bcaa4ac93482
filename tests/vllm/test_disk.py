"""Compiled graphs that vLLM keeps on disk and finds again in another process, with the plugin and without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.host, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
ARCH = os.environ.get("VLLM_TEST_ARCH", "gfx950")

PROGRAM = """
import hashlib, sys
import fake_rocm
fake_rocm.become(sys.argv[1])
from vllm import plugins
plugins.load_general_plugins()
from vllm.compilation.counter import compilation_counter
from vllm.config.compilation import CompilationMode, PassConfig
import vllm_toy
config = {"pass_config": PassConfig(fuse_rope_kvcache_cat_mla=False)}
model = vllm_toy.Model(vllm_toy.Options(mode=CompilationMode.VLLM_COMPILE, config=config))
batches = (vllm_toy.Batch(((7, 0), (3, 4)), 0), vllm_toy.Batch(((1, 7), (1, 30)), 2, padding=2))
outputs = [model.run(batch)[: batch.tokens].contiguous().view(vllm_toy.torch.uint8).numpy().tobytes() for batch in batches]
decode = model.attentions[0].__dict__.get("mlagen")
print("fused" if decode and decode.decode else "stock", *(hashlib.sha256(each).hexdigest()[:8] for each in outputs), flush=True)
print("compiled", compilation_counter.num_backend_compilations)
"""


@pytest.fixture
def start(once, tmp_path):
    """start(variables): what a process says of itself, of its prefill and of its decode, and how many graphs it compiled."""

    def start_(**variables):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLAGEN_VLLM", "VLLM_"))}
        path = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests", ROOT))), "VLLM_CACHE_ROOT": str(tmp_path)}
        command = [sys.executable, "-c", PROGRAM, ARCH]
        done = subprocess.run(command, env={**kept, **path, **variables}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        *_, said, compiled = done.stdout.splitlines()
        return *said.split(), int(compiled.split()[1])

    return start_


def test_graphs_from_disk(start, tmp_path):
    """They are used again, by the same kind of process only, and do not depend on whether a kernel was there."""
    nothing = {"MLAGEN_VLLM": "1", "MLAGEN_JIT": "0", "MLAGEN_CACHE_DIR": str(tmp_path / "empty")}
    without, fused, stock = start(**nothing), start(MLAGEN_VLLM="1"), start(MLAGEN_VLLM="0")
    assert (without[0], fused[0], stock[0]) == ("stock", "fused", "stock")
    assert without[1:3] == stock[1:3]
    assert fused[1] == stock[1]
    assert without[3] == stock[3] > 0
    assert fused[3] == 0, "the graph of the first process"
