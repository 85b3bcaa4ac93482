"""The layouts of the cache on a GPU: the oracle explains them, and the bytes are those of the same program on the CPU."""

import pytest
import torch
from helpers import Workload, check, make_launch, output_bytes

from mlagen.runtime import load
from mlagen.spec import PrologueSpec

pytestmark = pytest.mark.gpu

MODEL = {"heads": 16, "nope_dim": 128, "lora_rank": 512, "rope_dim": 64, "rope_style": "gptj"}
SPECS = {
    "segmented": PrologueSpec(**MODEL, kv_layout="segmented"),
    "segmented, bf16": PrologueSpec(**MODEL, kv_layout="segmented", kv_dtype="bf16"),
    "fp8_ds_mla": PrologueSpec(**MODEL, kv_layout="fp8_ds_mla"),
    "fp8_ds_mla, absorbed": PrologueSpec(**MODEL, kv_layout="fp8_ds_mla", weight="none", q_dtype="bf16"),
    "KV heads": PrologueSpec(**MODEL, kv_heads=4),
    "KV heads, rope first": PrologueSpec(**MODEL, kv_heads=3, nope_first=False, kv_dtype="bf16"),
}
DENSE = Workload(tokens=33, layout="dense", cache="dense", out="dense", block_size=64)
ODD = Workload(tokens=17, layout="sliced", cache="padded", block_size=3, special=True)
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@each_spec
@pytest.mark.parametrize("workload", [DENSE, ODD], ids=["dense", "odd"])
def test_the_oracle_explains_it(spec, workload):
    """Aligned rows and others: two kernels on NVIDIA."""
    check(load(spec, "cuda"), workload)


@each_spec
def test_dependent_kernels_too(spec):
    if torch.version.hip:
        pytest.skip("pdl")
    check(load(spec, "cuda", pdl=True), DENSE)


@pytest.mark.parametrize("name", ["segmented", "fp8_ds_mla"])
def test_the_cache_has_the_bytes_of_the_cpu(name):
    """Of the latent part, which no order of sums touches: the scales and codes, bit for bit."""
    gpu = load(SPECS[name], "cuda")
    cpu = load(SPECS[name], "cpu", arch=gpu.target.arch)
    launches = [make_launch(kernel, DENSE, seed=5) for kernel in (gpu, cpu)]
    for kernel, launch in zip((gpu, cpu), launches, strict=True):
        kernel(**launch.arguments)
    torch.cuda.synchronize()
    one, other = (launch.case.kv_cache.tensor.cpu().view(torch.uint8) for launch in launches)
    latent = 64 * 512 if name == "segmented" else 528
    assert torch.equal(one[..., :latent], other[..., :latent])


@each_spec
def test_a_graph_reads_what_its_inputs_hold_at_replay(spec):
    kernel = load(spec, "cuda")
    captured, fresh = (make_launch(kernel, DENSE, seed=seed) for seed in (1, 2))
    kernel(**captured.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(**captured.arguments)
    kernel(**fresh.arguments)
    before = output_bytes(fresh)
    for name, mine in captured.arguments.items():
        if name in ("out", "kv_cache"):
            continue
        theirs = fresh.arguments[name]
        for tensor, other in zip(mine, theirs, strict=True) if isinstance(mine, tuple) else ((mine, theirs),):
            if tensor is not None:
                tensor.copy_(other)
    for guarded in (captured.case.q_out, captured.case.kv_cache):
        guarded.tensor.view(torch.uint8).fill_(0xA5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output_bytes(captured), before)
