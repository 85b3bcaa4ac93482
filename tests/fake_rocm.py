"""Real vLLM on a machine without a GPU: it believes in ROCm and in an MI300X or MI355X, while its tensors are on the CPU.

become(arch) comes before anything of vLLM is imported, once a process.  Three things are made up, and nothing of vLLM's Python
code: amdsmi, which tells the architecture; the platform's device; and the C++ operators that vLLM names while it is imported, of
which only those compute something that write the cache and rotate.
"""

import sys
import types

import torch

NAMED = (
    *("rms_norm", "rms_norm_static_fp8_quant", "rms_norm_dynamic_per_token_quant", "rms_norm_per_block_quant"),
    *("fused_add_rms_norm", "fused_add_rms_norm_static_fp8_quant", "fused_qk_norm_rope"),
    *("silu_and_mul", "silu_and_mul_quant", "silu_and_mul_nvfp4_quant", "silu_and_mul_per_block_quant"),
    *("static_scaled_fp8_quant", "dynamic_scaled_fp8_quant", "dynamic_per_token_scaled_fp8_quant", "per_token_group_fp8_quant"),
    *("scaled_fp4_quant", "scaled_fp4_quant.out"),
)
"""Operators of namespace _C that vLLM's modules name while they are imported; nothing here calls them."""

ROPE_AND_CACHE_WRITE = (
    "concat_and_cache_mla_rope_fused(Tensor positions, Tensor! q_pe, Tensor! k_pe, Tensor kv_c, Tensor cos_sin_cache, "
    "bool is_neox, Tensor slot_mapping, Tensor! kv_cache, str kv_cache_dtype, Tensor kv_cache_scale) -> ()"
)
"""For a pass of vLLM's, whose pattern names it and whose replacement no test calls."""

CACHE_WRITE = (
    "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor! kv_cache, Tensor slot_mapping, str kv_cache_dtype, Tensor scale, "
    "bool skip_scale=False) -> ()"
)

ROTATION = (
    "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, bool is_neox, "
    "int rope_dim_offset=0, bool inverse=False) -> ()"
)
"""Which vLLM calls where its RoPE is an operator."""

_LIBRARIES = []
"""They undo their definitions when they go."""


def become(arch: str, device: str = "cpu") -> None:
    """Pretend to be a machine with one GPU of this architecture, whose tensors are on `device`: "cuda" is another GPU than that."""
    sys.modules["amdsmi"] = _amdsmi(arch)
    sys.modules["aiter"] = None  # or vLLM takes the folder tests/aiter for it
    key = device.upper()
    named, cache = (torch.library.Library(namespace, "FRAGMENT") for namespace in ("_C", "_C_cache_ops"))
    for name in NAMED:
        named.define(f"{name}() -> ()")
    named.define("weak_ref_tensor(Tensor(a) tensor) -> Tensor(a)")
    named.impl("weak_ref_tensor", lambda tensor: tensor.view_as(tensor), "CompositeImplicitAutograd")  # it may live longer here
    named.define(ROTATION)
    named.impl("rotary_embedding", rotary_embedding, key)
    cache.define(CACHE_WRITE)
    cache.impl("concat_and_cache_mla", concat_and_cache_mla, key)
    cache.define(ROPE_AND_CACHE_WRITE)
    _LIBRARIES.extend((named, cache))

    import vllm.platforms
    from vllm.platforms.rocm import RocmPlatform

    class Platform(RocmPlatform):
        device_type = device
        dispatch_key = key
        dist_backend = "gloo"

        @classmethod
        def num_compute_units(cls, device_id=0):
            return {"gfx942": 304, "gfx950": 256}[arch]

        @classmethod
        def get_mla_prefill_backend_cls(cls, selector_config):
            return _NoPrefill

    vllm.platforms._current_platform = Platform()


def _amdsmi(arch: str) -> types.ModuleType:
    module = types.ModuleType("amdsmi")
    about = {"target_graphics_version": arch, "device_id": "0x0", "market_name": "made up"}
    functions = {
        "init": lambda: None,
        "shut_down": lambda: None,
        "get_processor_handles": lambda: [0],
        "get_gpu_asic_info": lambda handle: about,
        "get_gpu_device_uuid": lambda handle: "0",
        "get_gpu_memory_total": lambda handle, kind: 192 << 30,
        "topo_get_link_type": lambda one, other: {"hops": 1, "type": 2},
        "topo_get_numa_node_number": lambda handle: 0,
    }
    for name, function in functions.items():
        setattr(module, f"amdsmi_{name}", function)
    module.AmdSmiException = type("AmdSmiException", (Exception,), {})
    module.AmdSmiMemoryType = types.SimpleNamespace(VRAM=0)
    return module


class _NoPrefill:
    """In place of the kernels of a prefill, which need a GPU; the tests' models bring their own attention."""

    def __init__(self, **options):
        pass

    def supports_quant_output(self, key):
        return False

    @staticmethod
    def get_name():
        return "NO_PREFILL"


def concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, skip_scale=False):
    """What vLLM's C++ operator does, saturating where the format ends."""
    rows = torch.cat((kv_c, k_pe), -1)[: slot_mapping.shape[0]]
    if kv_cache.dtype is torch.uint8:
        from vllm.platforms import current_platform

        fp8 = current_platform.fp8_dtype()
        largest = torch.finfo(fp8).max
        rows = (rows.float() * scale.float().reciprocal()).clamp(-largest, largest).to(fp8).view(torch.uint8)
    kept = slot_mapping >= 0
    slots, block_size = slot_mapping[kept], kv_cache.shape[1]
    kv_cache[slots // block_size, slots % block_size] = rows[kept].to(kv_cache.dtype)


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox):
    """What vLLM's C++ operator does, by its Python code for it."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    turned = RotaryEmbedding.forward_static(positions, query, key, head_size, head_size, cos_sin_cache, is_neox)
    query.copy_(turned[0])
    key.copy_(turned[1])
