"""The MLA layer in vLLM's models: its wrapper's class, replaced, and the operator that the wrapper's graph calls instead of two.

The wrapper's forward is the last place where the query and k_pe, not rotated yet, are together with the positions.  It runs as vLLM
wrote it, projections, norms and gate included, on a stand-in of the wrapper that does not rotate and hands attention to our
operator.  The operator looks at the batch when it runs, which a compiled graph cannot: see Prologue.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from mlagen.integrations.vllm.log import stand_aside
from mlagen.integrations.vllm.prologue import Prologue, prepare
from mlagen.integrations.vllm.splitting import OPERATOR, announce_operator

WRAPPER = "MultiHeadLatentAttentionWrapper"

KIMI_K3_WRAPPER = "KimiK3MultiHeadLatentAttentionWrapper"
"""A subclass with a forward of its own, in a module that only its model imports."""


def install(replace: Callable[[Any], type] | None = None) -> bool:
    """Replace the class of MLA wrappers that vLLM makes from now on, once; False where somebody else has replaced it.

    replace(base): the class in place of `base`, which is marked as one of Ours; without it, one whose decode is fused.
    """
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper

    base: Any = MultiHeadLatentAttentionWrapper
    if WRAPPER in op_registry_oot:
        return issubclass(op_registry_oot[WRAPPER], Ours)
    replace = replace or _fused
    announce_operator()
    _define_operator()
    subclasses = base.__subclasses__()
    base.register_oot(replace(base))
    _adopt(replace, *subclasses)

    # Kimi-K3's class may not be there yet, and its module is not ours to import: it brings the whole model.
    def adopt(cls: Any, /, **options: Any) -> None:
        super(base, cls).__init_subclass__(**options)
        _adopt(replace, cls)

    base.__init_subclass__ = classmethod(adopt)
    return True


def _adopt(replace: Callable[[Any], type], *classes: Any) -> None:
    """Replace Kimi-K3's wrapper, where it is one of these classes."""
    from vllm.model_executor.custom_op import op_registry_oot

    for cls in classes:
        if cls.__name__ == KIMI_K3_WRAPPER and KIMI_K3_WRAPPER not in op_registry_oot:
            cls.register_oot(replace(cls))


class Ours:
    """What marks our classes."""


def prepare_weights(wrapper: Any) -> None:
    """Have a wrapper's kernel and packed weights made where vLLM makes its own weights ready, as mla_attn.mlagen."""
    attn, rotate = wrapper.mla_attn, _rotation(wrapper.rotary_emb)
    process_weights = attn.process_weights_after_loading

    @functools.wraps(process_weights)
    def process_weights_after_loading(act_dtype: torch.dtype) -> None:
        process_weights(act_dtype)
        if getattr(attn, "mlagen", None) is not None:
            attn.mlagen.repack(attn)
        else:
            attn.mlagen = prepare(wrapper, act_dtype, rotate)

    attn.process_weights_after_loading = process_weights_after_loading


def _fused(base: Any) -> type:
    """The wrapper class that takes the place of `base`."""
    constant: Any = torch.compiler.assume_constant_result
    note_scaling = constant(_note_scaling)  # said when a graph is traced, and no part of it

    class FusedWrapper(Ours, base):
        def __init__(self, *args: Any, **options: Any) -> None:
            base.__init__(self, *args, **options)
            prepare_weights(self)

        def forward(
            self,
            positions: torch.Tensor,
            hidden_states: torch.Tensor,
            llama_4_scaling: torch.Tensor | None = None,
            *args: Any,
            **options: Any,
        ) -> torch.Tensor:
            wrapper: Any = self
            if getattr(self.mla_attn, "mlagen", None) is not None:
                if llama_4_scaling is None:
                    wrapper = _Unrotated(self, positions)
                else:  # it comes between the rotation and attention
                    note_scaling()
            found: torch.Tensor = base.forward(wrapper, positions, hidden_states, llama_4_scaling, *args, **options)
            return found

    FusedWrapper.__name__ = FusedWrapper.__qualname__ = f"Mlagen{base.__name__}"
    return FusedWrapper


def _note_scaling() -> bool:
    stand_aside("a layer", "Llama 4's scaling of the query by position")
    return True


class _Unrotated:
    """A wrapper in the eyes of its own forward: nothing to rotate, and attention is our operator."""

    rotary_emb = None
    _fused_qk_prep = False  # Kimi-K3's call of AITER, for which this one stands

    def __init__(self, wrapper: Any, positions: torch.Tensor) -> None:
        self.wrapper, self.positions = wrapper, positions

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
        torch.ops.vllm.mlagen_mla_attention(q, kv_c_normed, k_pe, self.positions, output, name)
        return output


def _rotation(rotary: Any) -> Any:
    """vLLM's RoPE as the wrapper's graph would have it: inside of our operator torch.compile does not see it by itself.

    Once for a module, which all layers share: each torch.compile would trace it again.
    """
    from vllm.model_executor.custom_op import CustomOp

    if not isinstance(rotary, CustomOp) or rotary.enabled():
        return rotary
    if "mlagen_rotation" not in rotary.__dict__:
        rotary.mlagen_rotation = rotary.maybe_compile(rotary.forward_native)
    return rotary.mlagen_rotation


@functools.cache
def _define_operator() -> None:
    """torch.ops.vllm.mlagen_mla_attention(q, kv_c_normed, k_pe, positions, output, layer_name), which writes q and output."""
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
    ) -> None:
        metadata, attn, kv_cache, slots = get_attention_context(_resolve_layer_name(layer_name))
        prologue: Prologue = attn.mlagen
        prologue.attend(attn, metadata, kv_cache, slots, q, kv_c_normed, k_pe, positions, output)

    # q is among them for vLLM's path, which rotates it in place: a copy of it would cost a prefill.
    direct_register_custom_op(
        OPERATOR.partition("::")[2],
        mlagen_mla_attention,
        mutates_args=["q", "output"],
        tags=(torch.Tag.flexible_layout,),
    )
