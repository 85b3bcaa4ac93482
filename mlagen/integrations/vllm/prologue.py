"""A layer's decode: mlagen's kernel for the prologue, and vLLM's own code for all that comes after it and for every other batch."""

import time
from collections.abc import Callable
from typing import Any

import torch

from mlagen.errors import MlagenError
from mlagen.integrations.vllm.choice import Choice, Unfit, choose, refuse_unknown
from mlagen.integrations.vllm.log import logger, stand_aside
from mlagen.integrations.vllm.weights import find_weights
from mlagen.runtime import Kernel, device_arch, load
from mlagen.spec import PrologueSpec
from mlagen.target import Target, find_target
from mlagen.torch_types import torch_dtype

_ANNOUNCED: set[tuple[PrologueSpec, torch.device]] = set()


class Prologue:
    """The kernel of one layer, its packed weights, and the choice between both paths for each batch."""

    def __init__(self, wrapper: Any, kernel: Kernel, choice: Choice, packed: torch.Tensor, rotate: Callable[..., Any]) -> None:
        self.kernel, self.packed, self.room = kernel, packed, choice.room
        self.rotary, self.rotate = wrapper.rotary_emb, rotate
        self.layer_name: str = wrapper.mla_attn.layer_name
        spec, target = kernel.spec, kernel.target
        self.q_dtype = torch_dtype(spec.output_dtype(spec.q_dtype, target))
        self.kv_dtype = torch_dtype(spec.output_dtype(spec.kv_dtype, target))
        self.cache_dtypes = (self.kv_dtype, torch.uint8) if spec.kv_dtype == "fp8" else (self.kv_dtype,)

    def repack(self, attn: Any) -> None:
        """Pack the weights again, where captured graphs read them."""
        weights = find_weights(attn)
        self.packed.copy_(self.kernel.pack_weights(weights.w_uk, weights.scale))

    def attend(
        self, attn: Any, metadata: Any, kv_cache: torch.Tensor, slots: torch.Tensor | None,
        q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, positions: torch.Tensor, output: torch.Tensor,
    ) -> None:  # fmt: skip
        """Attention of a batch, from what is not rotated yet.

        q [T,H,P+R], which is overwritten where vLLM's path rotates it; kv_c [T,L]; k_pe [T,1,R]; positions [T]; slots [<= T];
        output [T, H*V], the first num_actual_tokens rows of which are written, or all with zeros where there is no metadata.
        """
        if self._is_decode(attn, metadata, kv_cache, slots):
            self._decode(attn, metadata, kv_cache, slots, q, kv_c, k_pe, positions, output)
        else:
            self._stock(attn, metadata, kv_cache, slots, q, kv_c, k_pe, positions, output)

    def _is_decode(self, attn: Any, metadata: Any, kv_cache: torch.Tensor, slots: torch.Tensor | None) -> bool:
        """Whether every token of the batch is one of a decode, of one token or of a few (speculative decoding)."""
        if metadata is None or slots is None or kv_cache.numel() == 0:
            return False  # a profiling run, or one without a cache
        tokens = metadata.num_actual_tokens
        if tokens == 0 or tokens != metadata.num_decode_tokens:
            return False
        spec = self.kernel.spec
        reason = None
        if kv_cache.dtype not in self.cache_dtypes or kv_cache.shape[1:] != (kv_cache.shape[1], spec.entry_dim):
            reason = f"a KV cache {list(kv_cache.shape)} of {kv_cache.dtype}"
        elif kv_cache.stride(-1) != 1:
            reason = f"a KV cache whose entries have stride {kv_cache.stride(-1)}"
        elif slots.dim() != 1 or slots.shape[0] < tokens:
            reason = f"a slot mapping {list(slots.shape)} for {tokens} tokens"
        elif attn._q_scale.numel() != 1 or attn._k_scale.numel() != 1:
            reason = "a scale for each head"
        if reason is not None:
            stand_aside(self.layer_name, reason)
        return reason is None

    def _decode(
        self, attn: Any, metadata: Any, kv_cache: torch.Tensor, slots: Any,
        q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, positions: torch.Tensor, output: torch.Tensor,
    ) -> None:  # fmt: skip
        tokens, spec = metadata.num_actual_tokens, self.kernel.spec
        out: Any = None
        if self.room > spec.heads:
            out = torch.empty((tokens, self.room, spec.entry_dim), dtype=self.q_dtype, device=q.device)
        query = self.kernel(
            q[:tokens], kv_c[:tokens], k_pe[:tokens], self.packed, kv_cache, slots[:tokens], positions[:tokens],
            self.rotary.cos_sin_cache if spec.rope_style != "none" else None,
            q_scale=attn._q_scale if spec.q_dtype == "fp8" else None,
            k_scale=attn._k_scale if spec.kv_dtype == "fp8" else None,
            out=out,
        )  # fmt: skip
        if out is not None:
            query = out[:, : spec.heads]  # attention finds the room behind them by the strides
        # MLAAttention.forward_impl makes its query itself, from a rotated q: it has no place where a finished one could go in.
        # Behind the query it does these two calls, as vLLM's own wrapper for Kimi-K3 does behind AITER's fused kernel.
        found, _ = attn.impl.forward_mqa(query, kv_cache.view(self.kv_dtype), metadata, attn)
        attn._v_up_proj(found, out=output[:tokens])

    def _stock(
        self, attn: Any, metadata: Any, kv_cache: torch.Tensor, slots: torch.Tensor | None,
        q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, positions: torch.Tensor, output: torch.Tensor,
    ) -> None:  # fmt: skip
        """What the wrapper's forward, unified_mla_kv_cache_update and unified_mla_attention_with_output do, one after the other."""
        if self.rotary is not None:
            nope_dim = attn.qk_nope_head_dim
            # Some of vLLM's RoPE kernels work in place, and k_pe belongs to the projection before.
            q[..., nope_dim:], k_pe = self.rotate(positions, q[..., nope_dim:], k_pe.clone())
        attn.prepare_kv_cache_update(metadata)
        if slots is not None:
            attn.update_kv_cache(kv_c, k_pe, kv_cache, slots, metadata, attn.kv_cache_dtype, attn._k_scale)
        attn.forward_impl(q, kv_c, k_pe, kv_cache, metadata, output=output)


def prepare(wrapper: Any, dtype: torch.dtype, rotate: Callable[..., Any]) -> Prologue | None:
    """A layer's prologue, with its kernel loaded and its weights packed; None, with a word in the log, where vLLM's path stays.

    dtype is the model's; `rotate` is vLLM's RoPE, as the wrapper's graph would run it.
    """
    attn = wrapper.mla_attn
    try:
        refuse_unknown(wrapper)
        weights = find_weights(attn)
        device = weights.w_uk.device
        target = _target(device)
        choice = choose(wrapper, dtype, weights.kind, target)
        started = time.perf_counter()
        kernel = load(choice.spec, device, arch=target.arch)
        _announce(kernel, attn.layer_name, time.perf_counter() - started)
        return Prologue(wrapper, kernel, choice, kernel.pack_weights(weights.w_uk, weights.scale), rotate)
    except (Unfit, MlagenError) as error:
        stand_aside(attn.layer_name, str(error))
        return None


def _target(device: torch.device) -> Target:
    """The target of a GPU; on the CPU, where tests run, that of the GPU which vLLM believes in.  Raises TargetError."""
    if device.type == "cuda":
        return find_target(device_arch(torch.cuda.current_device() if device.index is None else device.index))
    from vllm.platforms.rocm import on_gfx942

    return find_target("gfx942" if on_gfx942() else "gfx950")


def _announce(kernel: Kernel, layer: str, seconds: float) -> None:
    """The line by which a user sees that decode is fused; once for all layers with this kernel."""
    if (kernel.spec, kernel.device) in _ANNOUNCED:
        return
    _ANNOUNCED.add((kernel.spec, kernel.device))
    logger().info(
        "mlagen: decode of %s, and of every layer like it, is fused: %s for %s on %s, ready after %.1f s",
        layer, kernel.generated.name, kernel.target.arch, kernel.device, seconds,
    )  # fmt: skip
