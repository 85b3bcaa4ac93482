"""What a layer does with a batch: the kernel's path for decodes, vLLM's for every other."""

import time
from collections.abc import Callable
from typing import Any, cast

import torch

from mlagen.errors import MlagenError
from mlagen.integrations.vllm.choice import Unfit, choose, refuse_unknown
from mlagen.integrations.vllm.decode import Decode
from mlagen.integrations.vllm.log import logger, stand_aside
from mlagen.integrations.vllm.weights import find_weights, on_load
from mlagen.runtime import Kernel, device_arch, load
from mlagen.spec import PrologueSpec
from mlagen.target import Target, find_target

_ANNOUNCED: set[tuple[PrologueSpec, torch.device]] = set()

_FAILED: dict[tuple[PrologueSpec, torch.device], MlagenError] = {}
"""Kernels that could not be had, and why: a build that fails takes as long as one that does not, and a model has many layers."""


class Prologue:
    """The choice between both paths of one layer for each batch.

    spec    the kernel's, where the layer is of a kind that has one; its model's graph, which vLLM keeps on disk by the hash of the
            configuration, may call our operator then
    decode  the kernel's path; None, and vLLM's path for every batch, where there is no spec, or where the kernel cannot be had in
            this process
    """

    def __init__(self, wrapper: Any, rotate: Callable[..., Any]) -> None:
        self.rotary, self.rotate = wrapper.rotary_emb, rotate
        self.layer_name: str = wrapper.mla_attn.layer_name
        self.spec, self.decode = cast("PrologueSpec | None", None), cast("Decode | None", None)

    @property
    def fits(self) -> bool:
        return self.spec is not None

    def prepare(self, wrapper: Any, dtype: torch.dtype) -> None:
        """Load the kernel and pack the weights, or say in the log why vLLM's path stays; `dtype` is the model's.

        Weights that are loaded again are packed again, in place.  Raises MlagenError where they cannot be: captured graphs would go
        on with the old ones.
        """
        attn = wrapper.mla_attn
        if self.decode is not None:
            self.decode.repack(find_weights(attn))
            return
        try:
            self.spec = None
            refuse_unknown(wrapper)
            weights = find_weights(attn)
            device = weights.w_uk.device
            target = _target(device)
            choice = choose(wrapper, dtype, weights.kind, target)
            self.spec = choice.spec
            self.decode = decode = Decode(_load(choice.spec, device, target, attn.layer_name), choice, weights)
            on_load(attn, weights.w_uk, lambda: decode.repack(find_weights(attn)))
        except (Unfit, MlagenError) as error:
            self.decode = None
            stand_aside(attn.layer_name, str(error))

    def attend(
        self, attn: Any, metadata: Any, kv_cache: torch.Tensor, slots: torch.Tensor | None,
        q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, positions: torch.Tensor, scaling: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:  # fmt: skip
        """Attention of a batch, from what is not rotated yet.

        q [T,H,P+R], which is overwritten where it is scaled, or where vLLM's path rotates it; kv_c [T,L]; k_pe [T,1,R]; positions
        [T]; slots [<= T]; scaling [T,1,1], Llama 4's of the rotated query by position; output [T, H*V], the first
        num_actual_tokens rows of which are written, or all with zeros where there is no metadata.
        """
        decode = self.decode
        if decode is not None and slots is not None and self._is_decode(decode, attn, metadata, kv_cache, slots, positions):
            table = self.rotary.cos_sin_cache if decode.kernel.spec.rope_style != "none" else None
            decode.run(attn, metadata, table, kv_cache, slots, q, kv_c, k_pe, positions, scaling, output)
        else:
            self._stock(attn, metadata, kv_cache, slots, q, kv_c, k_pe, positions, scaling, output)

    def _is_decode(
        self, decode: Decode, attn: Any, metadata: Any, kv_cache: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> bool:
        """Whether every token of the batch is one of a decode, of one token or of a few (speculative decoding)."""
        if metadata is None or kv_cache.numel() == 0:
            return False  # a profiling run, or one without a cache
        tokens = metadata.num_actual_tokens
        if tokens == 0 or tokens != metadata.num_decode_tokens:
            return False
        reason = decode.refuse(attn, tokens, kv_cache, slots, positions)
        if reason is not None:
            stand_aside(self.layer_name, reason)
        return reason is None

    def _stock(
        self, attn: Any, metadata: Any, kv_cache: torch.Tensor, slots: torch.Tensor | None,
        q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, positions: torch.Tensor, scaling: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:  # fmt: skip
        """What the wrapper's forward, unified_mla_kv_cache_update and unified_mla_attention_with_output do, one after the other."""
        nope_dim = attn.qk_nope_head_dim
        if self.rotary is not None:
            # Some of vLLM's RoPE kernels work in place, and k_pe belongs to the projection before.
            q[..., nope_dim:], k_pe = self.rotate(positions, q[..., nope_dim:], k_pe.clone(), scaling)
            if scaling is not None:
                q[..., :nope_dim] *= scaling
        elif scaling is not None:
            q *= scaling
        attn.prepare_kv_cache_update(metadata)
        if slots is not None:
            attn.update_kv_cache(kv_c, k_pe, kv_cache, slots, metadata, attn.kv_cache_dtype, attn._k_scale)
        attn.forward_impl(q, kv_c, k_pe, kv_cache, metadata, output=output)


def _target(device: torch.device) -> Target:
    """The target of a GPU; on the CPU, where tests run, that of the GPU which vLLM believes in.  Raises TargetError, Unfit."""
    from vllm.platforms import current_platform

    if device.type != current_platform.device_type:  # a kernel for the CPU would be found, and refuse the first batch
        raise Unfit(f"weights on device {device}, in a model on {current_platform.device_type}")
    if device.type == "cuda":
        return find_target(device_arch(torch.cuda.current_device() if device.index is None else device.index))
    from vllm.platforms.rocm import on_gfx942

    return find_target("gfx942" if on_gfx942() else "gfx950")


def _load(spec: PrologueSpec, device: torch.device, target: Target, layer: str) -> Kernel:
    """The kernel, with two lines that say what takes time, and that decode is fused; once for all layers with this kernel.

    Raises MlagenError, for each of these layers the same one.
    """
    key = spec, device
    if key in _FAILED:
        raise _FAILED[key]
    is_new = key not in _ANNOUNCED
    _ANNOUNCED.add(key)
    if is_new:
        logger().info("mlagen: loading or building the kernel of %s, and of every layer like it", layer)
    started = time.perf_counter()
    try:
        kernel = load(spec, device, arch=target.arch)
    except MlagenError as error:
        _FAILED[key] = error
        raise
    if is_new:
        logger().info(
            "mlagen: decode of %s, and of every layer like it, is fused: %s for %s on %s, ready after %.1f s",
            layer, kernel.generated.name, target.arch, device, time.perf_counter() - started,
        )  # fmt: skip
    return kernel
