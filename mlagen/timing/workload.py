"""What is timed: one decode step through many layers, each with a W_UK and a KV cache of its own."""

import math
from dataclasses import dataclass

import torch

from mlagen.cache_layout import cache_shape
from mlagen.dtypes import model_dtype
from mlagen.quantization import WeightCodes, quantize_weights
from mlagen.reference import dequantize_weights
from mlagen.spec import WEIGHT_CODES, PrologueSpec
from mlagen.target import Target
from mlagen.torch_types import torch_dtype

MAX_POSITION = 4096
LEAST_SLOTS = 1024
BLOCK_SIZE = 16

SCALE = 2.0**-4
"""Of both fp8 outputs.  Values of about 1 stay far from either flavour's limit; and dividing by a power of two is the same as
multiplying by its inverse, so that no method is wrong for the order in which it does either."""

COLD_SHARE = 2
"""How often the weights of all layers fill the last cache, so that nothing of a layer's is left when its turn comes again."""

MAX_LAYERS = 1000
"""Launches in one graph; a capture of more takes minutes."""


@dataclass(frozen=True)
class Workload:
    """The tensors of `tokens` tokens on their way through the layers, all on one device.

    q [T,H,P+R] (or [T,H,L+R] where the spec does not absorb), kv_c [T,L], k_pe [T,R] and cos_sin_cache [MAX_POSITION,R] in the
    model's dtype; w_uk: for each layer [H,P,L] in that dtype, none where the spec does not absorb; codes: the same where the spec's
    weights are codes, of which w_uk then holds the values, rounded; caches: for each layer [slots, L+R] in the
    cache's dtype, which paged() sees as blocks; slot_mapping and positions int64 [T], every slot another and none negative;
    q_scale and k_scale fp32 [1].  Of several KV heads kv_c, k_pe and the caches have their number before the columns.
    """

    spec: PrologueSpec
    target: Target
    q: torch.Tensor
    kv_c: torch.Tensor
    k_pe: torch.Tensor
    cos_sin_cache: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    q_scale: torch.Tensor
    k_scale: torch.Tensor
    w_uk: tuple[torch.Tensor, ...]
    codes: tuple[WeightCodes, ...]
    caches: tuple[torch.Tensor, ...]

    @property
    def tokens(self) -> int:
        return self.q.shape[0]

    @property
    def layers(self) -> int:
        return len(self.caches)

    @property
    def q_nope(self) -> torch.Tensor:
        """[T,H,P], or [T,H,L] where it arrives absorbed; a view of q."""
        return self.q[..., : self.spec.q_nope_dim]

    @property
    def q_pe(self) -> torch.Tensor:
        """[T,H,R]; a view of q."""
        return self.q[..., self.spec.q_nope_dim :]

    @property
    def q_dtype(self) -> torch.dtype:
        """Of q_out."""
        return torch_dtype(self.spec.output_dtype(self.spec.q_dtype, self.target))

    @property
    def weight_bytes(self) -> int:
        """Of one layer's W_UK as the spec has it, with its scales."""
        tensors = (self.codes[0].w_uk, self.codes[0].scale) if self.codes else self.w_uk[:1]
        return sum(tensor.nbytes for tensor in tensors)

    def paged(self, layer: int) -> torch.Tensor:
        """A layer's cache in blocks of BLOCK_SIZE slots, in the spec's layout; the same memory."""
        cache = self.caches[layer]
        return cache.view(cache_shape(self.spec, len(cache) // BLOCK_SIZE, BLOCK_SIZE))

    def out(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """What a kernel takes as `out`, to write to."""
        if self.spec.q_split:
            return self.empty(self.spec.lora_rank, self.q_dtype), self.empty(self.spec.rope_dim, self.q_dtype)
        if self.spec.q_scaling == "token":
            return self.empty(self.spec.entry_dim, self.q_dtype), self.empty(1, torch.float32)[..., 0]
        return self.empty(self.spec.entry_dim, self.q_dtype) if self.spec.write_q else None

    def empty(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """An output [T,H,width] to write to."""
        return torch.empty(self.tokens, self.spec.heads, width, dtype=dtype, device=self.q.device)


def make_workload(
    spec: PrologueSpec, target: Target, tokens: int, layers: int, *, device: torch.device | str, seed: int = 0
) -> Workload:
    """Random values of about 1, and weights that keep them so, drawn on `device`."""
    generator = torch.Generator(device).manual_seed(seed)
    model = torch_dtype(model_dtype(spec.dtype))
    cache_dtype = torch_dtype(spec.cache_dtype(target))

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(model)

    slots = max(LEAST_SLOTS, -(-tokens // BLOCK_SIZE) * BLOCK_SIZE)
    frequencies = 10000.0 ** -(torch.arange(0, spec.rope_dim, 2, device=device) / max(spec.rope_dim, 1))
    angles = torch.arange(MAX_POSITION, device=device)[:, None] * frequencies
    scale = torch.full((1,), SCALE, device=device)
    q = draw(tokens, spec.heads, spec.q_nope_dim + spec.rope_dim)
    kv_c = draw(tokens, *spec.kv_inner, spec.lora_rank)
    k_pe = draw(tokens, *spec.kv_inner, spec.rope_dim)
    positions = torch.randint(0, MAX_POSITION, (tokens,), generator=generator, device=device)
    slot_mapping = torch.randperm(slots, generator=generator, device=device)[:tokens]
    w_uk, codes = [], []
    for _ in range(layers if spec.absorbs else 0):
        w_uk.append(draw(spec.heads, spec.nope_dim, spec.lora_rank, scale=spec.nope_dim**-0.5))
        if spec.weight in WEIGHT_CODES:
            codes.append(quantize_weights(w_uk[-1], spec, torch_dtype(target.fp8)))
            w_uk[-1] = weight_values(codes[-1]).to(model)
    return Workload(
        spec=spec,
        target=target,
        q=q,
        kv_c=kv_c,
        k_pe=k_pe,
        cos_sin_cache=torch.cat((angles.cos(), angles.sin()), -1).to(model),
        positions=positions,
        slot_mapping=slot_mapping,
        q_scale=scale,
        k_scale=scale,
        w_uk=tuple(w_uk),
        codes=tuple(codes),
        caches=tuple(torch.zeros(slots, *spec.kv_inner, spec.cache_width, dtype=cache_dtype, device=device) for _ in range(layers)),
    )


def weight_values(codes: WeightCodes) -> torch.Tensor:
    """W_UK [H,P,L] in fp64."""
    w_uk = codes.w_uk
    return dequantize_weights(w_uk if w_uk.dtype is torch.uint8 else w_uk.double(), codes.scale)


def cold_layers(spec: PrologueSpec, target: Target, layers: int, weight_bytes: float) -> int:
    """How many layers to take so that W_UK comes from memory in every one, as it does in a model: `layers`, or more.

    `weight_bytes` is the size of an element in the smallest W_UK that is timed.  At most MAX_LAYERS, which a few heads alone may
    not fill the cache with.
    """
    if not spec.absorbs:
        return layers
    layer_bytes = spec.heads * spec.nope_dim * spec.lora_rank * weight_bytes
    cold = math.ceil(COLD_SHARE * target.last_cache_bytes / layer_bytes)
    return max(layers, min(cold, MAX_LAYERS))
