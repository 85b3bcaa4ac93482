"""W_UK as vLLM's MLAAttention prepares it, in the words of Kernel.pack_weights."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mlagen.integrations.vllm.choice import Unfit


@dataclass(frozen=True)
class Weights:
    """W_UK [H,P,L], or [H,P/2,L] in pairs of codes, its scale, and a spec's word for its type (None: the model's); any strides."""

    w_uk: torch.Tensor
    scale: torch.Tensor | None
    kind: str | None


def find_weights(attn: Any) -> Weights:
    """What process_weights_after_loading left.  Raises Unfit for a form that is not known.

    The order is that of MLAAttention.forward_impl: both of AITER's forms may be asked for at once.  vLLM's forms stay: batches
    with a prefill still read them.
    """
    if attn.is_aiter_triton_fp4_bmm_enabled:  # W_K [H, L, P/2], W_K_scale [H, L, P/32], the even column in the low nibble
        return Weights(attn.W_K.data.view(torch.uint8).mT, attn.W_K_scale.data.view(torch.uint8).mT, "mxfp4")
    if attn.is_aiter_triton_fp8_bmm_enabled:  # W_K [H, L, P], W_K_scale one value
        return Weights(attn.W_K.data.mT, attn.W_K_scale.data, "fp8")
    w_uk = getattr(attn, "W_UK_T", None)
    if w_uk is None:
        raise Unfit("W_UK in none of the forms W_UK_T and AITER's W_K")
    return Weights(w_uk.data, None, None)  # a view of kv_b_proj where that is not quantised


def on_load(attn: Any, w_uk: torch.Tensor, changed: Callable[[], None]) -> None:
    """Have `changed` called whenever kv_b_proj is loaded in place, where `w_uk` is a view of it.

    vLLM's own reloading processes the layer again.  Trainers that call the model's load_weights between two steps do not, and with
    vLLM's operators need not: the view has the new numbers.
    """
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    weight = getattr(attn.kv_b_proj, "weight", None)
    if weight is None or weight.untyped_storage().data_ptr() != w_uk.untyped_storage().data_ptr():
        return
    load = getattr(weight, "weight_loader", default_weight_loader)

    @functools.wraps(load)
    def load_and_tell(*args: Any, **options: Any) -> Any:
        found = load(*args, **options)
        changed()
        return found

    weight.weight_loader = load_and_tell
