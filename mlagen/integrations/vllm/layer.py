"""The MLA layer in vLLM's models: its wrapper's class, replaced, and the operator that the wrapper's graph calls instead of two.

The wrapper's forward is the last place where the query and k_pe, not rotated yet, are together with the positions.  It runs as vLLM
wrote it, projections, norms and gate included, on a stand-in of the wrapper that does not rotate and hands attention to our
operator.  The operator looks at the batch when it runs, which a compiled graph cannot: see Prologue.
"""

import functools
from typing import Any

import torch

from mlagen.errors import RequestError
from mlagen.integrations.vllm.graph_route import add_pass, why_unseen
from mlagen.integrations.vllm.log import stand_aside
from mlagen.integrations.vllm.plugin import IN_GRAPH, IN_LAYER, route_of
from mlagen.integrations.vllm.prologue import Prologue
from mlagen.integrations.vllm.splitting import OPERATOR


def fused(base: Any) -> type:
    """The wrapper class that takes the place of `base`."""
    _define_operator()

    class FusedWrapper(base):
        def __init__(self, *args: Any, **options: Any) -> None:
            base.__init__(self, *args, **options)
            attn = self.mla_attn
            route = _route_of(attn)
            if route is None:
                return
            self.decodes_in_layer = route == IN_LAYER
            if route == IN_GRAPH:
                add_pass()  # in a process that got the configuration ready-made nobody has
            attn.mlagen = Prologue(self, _rotation(self.rotary_emb))
            process_weights = attn.process_weights_after_loading

            @functools.wraps(process_weights)
            def process_weights_after_loading(act_dtype: torch.dtype) -> None:
                process_weights(act_dtype)
                attn.mlagen.prepare(self, act_dtype)

            attn.process_weights_after_loading = process_weights_after_loading

        def forward(
            self,
            positions: torch.Tensor,
            hidden_states: torch.Tensor,
            llama_4_scaling: torch.Tensor | None = None,
            *args: Any,
            **options: Any,
        ) -> torch.Tensor:
            wrapper: Any = self
            prologue = getattr(self.mla_attn, "mlagen", None)
            if prologue is not None and prologue.fits and self.decodes_in_layer:
                wrapper, llama_4_scaling = _Unrotated(self, positions, llama_4_scaling), None
            found: torch.Tensor = base.forward(wrapper, positions, hidden_states, llama_4_scaling, *args, **options)
            return found

    FusedWrapper.__name__ = FusedWrapper.__qualname__ = f"Mlagen{base.__name__}"
    return FusedWrapper


def _route_of(attn: Any) -> str | None:
    """How this layer shall decode by its model's configuration; where that cannot be, None and a word in the log."""
    config = attn._vllm_config
    try:
        route = route_of(config.additional_config)
    except RequestError:
        return None  # which was said when the configuration was made
    reason = why_unseen(config.compilation_config) if route == IN_GRAPH else None
    if reason is not None:
        stand_aside(attn.layer_name, reason)
        return None
    return route


class _Unrotated:
    """A wrapper in the eyes of its own forward: nothing to rotate or to scale, and attention is our operator."""

    rotary_emb = None
    _fused_qk_prep = False  # Kimi-K3's call of AITER, for which this one stands

    def __init__(self, wrapper: Any, positions: torch.Tensor, scaling: torch.Tensor | None) -> None:
        self.wrapper, self.positions, self.scaling = wrapper, positions, scaling

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapper, name)

    def mla_attn(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        output_shape: tuple[int, int],
        q_dcp_replicated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """In place of MLAAttention.forward."""
        from vllm.utils.torch_utils import _encode_layer_name

        output = torch.empty(output_shape, dtype=q.dtype, device=q.device)
        name = _encode_layer_name(self.wrapper.mla_attn.layer_name)
        torch.ops.vllm.mlagen_mla_attention(q, kv_c_normed, k_pe, self.positions, output, name, self.scaling)
        return output


def _rotation(rotary: Any) -> Any:
    """vLLM's RoPE, and Llama 4's scaling behind it, as the wrapper's graph would have them.

    Compiled where that graph would be: inside of our operator torch.compile does not see it by itself.  Once for a module, which
    all layers share: each torch.compile would trace it again.
    """
    from vllm.model_executor.custom_op import CustomOp

    compiles = isinstance(rotary, CustomOp) and not rotary.enabled()
    rotate = rotary.forward_native if compiles else rotary

    def rotation(
        positions: torch.Tensor, q_pe: torch.Tensor, k_pe: torch.Tensor, scaling: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rotated, k_pe = rotate(positions, q_pe, k_pe)
        # Rounded to q's dtype in between, as by the wrapper, which puts it back into q.
        return (rotated if scaling is None else rotated.to(q_pe.dtype) * scaling), k_pe

    if not compiles:
        return rotation
    if "mlagen_rotation" not in rotary.__dict__:
        rotary.mlagen_rotation = rotary.maybe_compile(rotation)
    return rotary.mlagen_rotation


@functools.cache
def _define_operator() -> None:
    """torch.ops.vllm.mlagen_mla_attention(q, kv_c_normed, k_pe, positions, output, layer_name, scaling), writes q and output."""
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture
    from vllm.model_executor.layers.attention.attention import get_attention_context
    from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
    from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name, direct_register_custom_op

    # The order of the decorators is vLLM's: transfers of the cache belong to what a breakable graph runs between its parts.
    @eager_break_during_capture
    @maybe_transfer_kv_layer
    def mlagen_mla_attention(
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        positions: torch.Tensor,
        output: torch.Tensor,
        layer_name: LayerNameType,
        scaling: torch.Tensor | None = None,
    ) -> None:
        metadata, attn, kv_cache, slots = get_attention_context(_resolve_layer_name(layer_name))
        prologue: Prologue = attn.mlagen
        prologue.attend(attn, metadata, kv_cache, slots, q, kv_c_normed, k_pe, positions, scaling, output)

    # q is among them for vLLM's path, which rotates it in place: a copy of it would cost a prefill.
    direct_register_custom_op(
        OPERATOR.partition("::")[2],
        mlagen_mla_attention,
        mutates_args=["q", "output"],
        tags=(torch.Tag.flexible_layout,),
    )
