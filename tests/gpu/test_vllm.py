"""The plugin in real vLLM on a GPU, with the kernels of its Triton attention: eager, and in vLLM's own graphs.

On another GPU than AMD's vLLM is told that it is on one, and its Triton kernels that they are not; mlagen runs the program of the
GPU that is there.
"""

import importlib
import os
from types import SimpleNamespace

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

ROWS, HEADS = 8, 16

MODELS = {
    "fp8 cache": {"fp8_query": False},
    "bf16 cache": {"cache": "auto", "rope": "neox"},
    "NoPE": {"fp8_query": False, "rope": "none", "q_lora": False},
}
WHOLE, PARTITION = {"splitting_ops": []}, {"use_inductor_graph_partition": True}
GRAPHS = {
    "piecewise": ("PIECEWISE", {}, True),
    "full": ("FULL_DECODE_ONLY", {}, True),
    "full, compiled whole": ("FULL", WHOLE, True),
    "both, partitioned": ("FULL_AND_PIECEWISE", PARTITION, True),
    "full, rewritten": ("FULL", WHOLE, "graph"),
    "both, partitioned, rewritten": ("FULL_AND_PIECEWISE", PARTITION, "graph"),
}


@pytest.fixture(scope="module")
def toy():
    import fake_rocm

    os.environ.update(VLLM_PLUGINS="", VLLM_DISABLE_COMPILE_CACHE="1", VLLM_USE_AOT_COMPILE="0")
    if torch.version.hip is None:
        fake_rocm.become("gfx950", device="cuda")
        from vllm.v1.attention.ops import triton_decode_attention

        triton_decode_attention.is_hip_ = False
    return importlib.import_module("vllm_toy")


class Batch:
    """ROWS rows: the first are decodes of one token each, the others padding."""

    def __init__(self, toy, decodes: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        before = torch.randint(1, 30, (decodes,), generator=generator)
        pages = torch.randperm(toy.BLOCKS, generator=generator)[: 2 * decodes].view(decodes, 2)
        padding = ROWS - decodes
        slots = pages[torch.arange(decodes), before // toy.BLOCK_SIZE] * toy.BLOCK_SIZE + before % toy.BLOCK_SIZE
        pad = torch.nn.functional.pad
        tensors = {
            "hidden_states": torch.randn(ROWS, toy.HIDDEN, generator=generator).bfloat16(),
            "positions": pad(before, (0, padding)),
            "slots": pad(slots, (0, padding), value=-1),
            "pages": pad(pages, (0, 0, 0, padding)).int(),
            "lengths": pad(before + 1, (0, padding)).int(),
        }
        self.decodes, self.tensors = decodes, {name: tensor.cuda() for name, tensor in tensors.items()}

    def become(self, other: "Batch") -> None:
        """Other values in the same memory, as a graph's inputs have it."""
        for name, tensor in self.tensors.items():
            tensor.copy_(other.tensors[name])


def run(model, batch: Batch, mode: str = "NONE", module=None) -> torch.Tensor:
    """All ROWS rows, as one decode step of vLLM's runner has them."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor, set_forward_context

    runtime_mode, tensors = CUDAGraphMode[mode], batch.tensors
    decode = SimpleNamespace(block_table=tensors["pages"], seq_lens=tensors["lengths"])
    metadata = SimpleNamespace(
        num_actual_tokens=ROWS, num_decode_tokens=ROWS, num_decodes=ROWS, num_prefills=0, prefill=None, decode=decode,
        max_seq_len=32, causal=True,
    )  # fmt: skip
    is_full = mode == "FULL"
    descriptor = BatchDescriptor(ROWS, num_reqs=ROWS if is_full else None, uniform=is_full) if mode != "NONE" else None
    names = [each.layer_name for each in model.attentions]
    context = set_forward_context(
        dict.fromkeys(names, metadata), model.config, num_tokens=ROWS, slot_mapping=dict.fromkeys(names, tensors["slots"]),
        cudagraph_runtime_mode=runtime_mode, batch_descriptor=descriptor,
    )  # fmt: skip
    with context, torch.inference_mode():
        return (module or model.module)(positions=tensors["positions"], hidden_states=tensors["hidden_states"]).clone()


def check(stock, ours, batch: Batch, run_ours) -> None:
    """A step of both from the same caches: outputs within a few roundings, cache entries in the same slots."""
    for one, other in zip(stock.caches, ours.caches, strict=True):
        one.copy_(other)
    before = [cache.clone() for cache in ours.caches]
    expected, found = run(stock, batch)[: batch.decodes], run_ours()[: batch.decodes]
    few_roundings = 8 * torch.finfo(torch.bfloat16).eps * expected.float().abs().max()
    assert (expected.float() - found.float()).abs().max() <= few_roundings
    for old, one, other in zip(before, stock.caches, ours.caches, strict=True):
        written = [(cache != old).any(-1).flatten() for cache in (one, other)]
        assert torch.equal(*written)
        assert int(written[0].sum()) == batch.decodes


@pytest.fixture
def models(toy, monkeypatch):
    """models(**options): stock and with the plugin, on the GPU."""
    from vllm.model_executor import custom_op

    from mlagen.integrations.vllm import register

    monkeypatch.setenv("MLAGEN_VLLM", "1")
    register()
    replaced = dict(custom_op.op_registry_oot)

    def build(compiled=None, **options):
        found = []
        for registry, more in (({}, {}), (replaced, compiled or {})):
            monkeypatch.setattr(custom_op, "op_registry_oot", registry)
            found.append(toy.Model(toy.Options(heads=HEADS, **more, **options), device="cuda"))
        return found

    return build


@pytest.fixture
def decodes(toy, monkeypatch) -> list[str]:
    """Layers whose decode Python has led through the plugin."""
    from mlagen.integrations.vllm.decode import Decode

    seen, run = [], Decode.run

    def counted(self, attn, *arguments):
        seen.append(attn.layer_name)
        run(self, attn, *arguments)

    monkeypatch.setattr(Decode, "run", counted)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_eager(toy, models, decodes, name):
    stock, ours = models(**MODELS[name])
    for batch in (Batch(toy, 5, 1), Batch(toy, ROWS, 2)):
        check(stock, ours, batch, lambda batch=batch: run(ours, batch))
    assert len(decodes) == 4


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(toy, models, decodes, name):
    """Captured once, replayed with other batches; in full graphs without a line of Python."""
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.config import CUDAGraphMode
    from vllm.config.compilation import CompilationMode, PassConfig

    cudagraph_mode, split, switch = GRAPHS[name]
    config = {"cudagraph_mode": cudagraph_mode, "cudagraph_capture_sizes": [ROWS], **split}
    config["pass_config"] = PassConfig(fuse_rope_kvcache_cat_mla=False)  # its kernel is one of those that are not here
    config["inductor_compile_config"] = {"force_disable_caches": True}  # or no pass runs
    compiled = {"mode": CompilationMode.VLLM_COMPILE, "config": config, "additional": {"mlagen": switch}}
    stock, ours = models(compiled, **MODELS["fp8 cache"])
    mode = "PIECEWISE" if cudagraph_mode == "PIECEWISE" else "FULL"
    module = CUDAGraphWrapper(ours.module, ours.config, CUDAGraphMode.FULL) if mode == "FULL" else None
    static = Batch(toy, 5, 3)
    for runtime_mode in ("NONE", mode, mode):  # warm-up, capture, replay
        run(ours, static, runtime_mode, module)
    decodes.clear()
    for number in (1, 5, ROWS):
        batch = Batch(toy, number, 10 + number)
        static.become(batch)
        check(stock, ours, batch, lambda: run(ours, static, mode, module))
    assert len(decodes) == (6 if mode == "PIECEWISE" else 0)
