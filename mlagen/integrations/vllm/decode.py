"""The decode of one layer: mlagen's kernel for the prologue, and vLLM's own code for all that comes after it."""

from typing import Any

import torch

from mlagen.integrations.vllm.choice import Choice
from mlagen.integrations.vllm.weights import Weights
from mlagen.runtime import Kernel
from mlagen.torch_types import torch_dtype


class Decode:
    """A kernel and the packed weights of one layer."""

    def __init__(self, kernel: Kernel, choice: Choice, weights: Weights) -> None:
        self.kernel, self.room = kernel, choice.room
        self.packed = kernel.pack_weights(weights.w_uk, weights.scale)
        spec, target = kernel.spec, kernel.target
        self.q_dtype = torch_dtype(spec.output_dtype(spec.q_dtype, target))
        self.kv_dtype = torch_dtype(spec.output_dtype(spec.kv_dtype, target))
        self.cache_dtypes = (self.kv_dtype, torch.uint8) if spec.kv_dtype == "fp8" else (self.kv_dtype,)

    def repack(self, weights: Weights) -> None:
        """Pack the weights again, where captured graphs read them."""
        self.packed.copy_(self.kernel.pack_weights(weights.w_uk, weights.scale))

    def refuse(self, attn: Any, tokens: int, kv_cache: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> str | None:
        """Why a batch of decodes cannot go through the kernel; None where it can."""
        spec = self.kernel.spec
        if kv_cache.dtype not in self.cache_dtypes or kv_cache.shape[1:] != (kv_cache.shape[1], spec.entry_dim):
            return f"a KV cache {list(kv_cache.shape)} of {kv_cache.dtype}"
        if kv_cache.stride(-1) != 1:
            return f"a KV cache whose entries have stride {kv_cache.stride(-1)}"
        if slots.dim() != 1 or slots.shape[0] < tokens:
            return f"a slot mapping {list(slots.shape)} for {tokens} tokens"
        if positions.dim() != 1:
            return f"positions {list(positions.shape)}"
        if attn._q_scale.numel() != 1 or attn._k_scale.numel() != 1:
            return "a scale for each head"
        return None

    def run(
        self, attn: Any, metadata: Any, table: torch.Tensor | None, kv_cache: torch.Tensor, slots: torch.Tensor,
        q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, positions: torch.Tensor, scaling: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:  # fmt: skip
        """Attention of the batch's first num_actual_tokens rows; nothing else is read or written.  `table`: cos and sin.

        `scaling` of the rotated query is one of the query: a rotation is linear.
        """
        tokens, spec = metadata.num_actual_tokens, self.kernel.spec
        if scaling is not None:
            q[:tokens] *= scaling[:tokens]
        out: Any = None
        if self.room > spec.heads:
            out = torch.empty((tokens, self.room, spec.entry_dim), dtype=self.q_dtype, device=q.device)
        query = self.kernel(
            q[:tokens], kv_c[:tokens], k_pe[:tokens], self.packed, kv_cache, slots[:tokens], positions[:tokens], table,
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
