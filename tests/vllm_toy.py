"""A model of two MLA layers around vLLM's real wrapper, and batches for it.

Only what needs a GPU is replaced: attention itself, decode and prefill, in plain torch.  It is the same in the stock model and in
the one with the plugin, so that their outputs differ by nothing but the prologue.  On a GPU vLLM's Triton attention does decodes.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.config.compilation import CompilationMode
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.mla import MLAModules, MultiHeadLatentAttentionWrapper
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, get_rope
from vllm.platforms import current_platform

HIDDEN, L, R, P, V, QL = 48, 256, 64, 32, 32, 96
BLOCKS, BLOCK_SIZE, MAX_POSITION = 16, 16, 256
YARN = {"rope_type": "deepseek_yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.5}


@dataclass(frozen=True)
class Options:
    """What a model is like."""

    heads: int = 4
    dtype: torch.dtype = torch.bfloat16
    cache: str = "fp8"
    fp8_query: bool = True  # whether attention takes one; of no importance beside another cache
    rope: str = "gptj"  # gptj with YaRN, neox, none
    fp32_table: bool = False
    fp32_rope: bool = False  # vLLM's RoPE, but with fp32 in and out
    in_place_rope: bool = False  # vLLM's RoPE as one of its kernels that write over what they read
    scaling: bool = False  # Llama 4's, of the query by position
    skipped: tuple[str, ...] = ()  # layers whose cache is not in fp8
    q_lora: bool = True
    gate: bool = False
    bmm: str = ""  # AITER's form of W_K: fp8, fp4
    aiter: bool = False  # attention calls itself ROCM_AITER_MLA
    wrapper: type = MultiHeadLatentAttentionWrapper
    mode: CompilationMode = CompilationMode.NONE
    config: dict[str, Any] = field(default_factory=dict)  # more of CompilationConfig
    additional: dict[str, Any] = field(default_factory=dict)  # VllmConfig's additional_config


class Linear(nn.Linear):
    """As vLLM's, which return a bias too."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.params_dtype, self.quant_method = self.weight.dtype, None

    def forward(self, x):
        return super().forward(x), None


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x):
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)


def modules(options: Options) -> MLAModules:
    has_lora, query = options.q_lora, options.heads * (P + R)
    rotary = None
    if options.rope != "none":
        parameters = {"rope_theta": 10000.0, **(YARN if options.rope == "gptj" else {"rope_type": "default"})}
        _ROPE_DICT.clear()  # a rotation that an earlier model has changed is not this one's
        rotary = get_rope(R, max_position=MAX_POSITION, is_neox_style=options.rope == "neox", rope_parameters=parameters)
        if options.fp32_table:
            rotary.cos_sin_cache = rotary._compute_cos_sin_cache().float()
        if options.fp32_rope:
            rotate = rotary.forward_native
            rotary._forward_method = lambda positions, q, k: rotate(positions, q.float(), k.float())
        if options.in_place_rope:
            rotate_into = rotary.forward_native
            rotary._forward_method = lambda positions, q, k: tuple(
                each.copy_(found) for each, found in zip((q, k), rotate_into(positions, q, k), strict=True)
            )
    return MLAModules(
        kv_a_layernorm=Norm(L),
        kv_b_proj=Linear(L, options.heads * (P + V)),
        rotary_emb=rotary,
        o_proj=Linear(options.heads * V, HIDDEN),
        fused_qkv_a_proj=Linear(HIDDEN, QL + L + R) if has_lora else None,
        kv_a_proj_with_mqa=None if has_lora else Linear(HIDDEN, L + R),
        q_a_layernorm=Norm(QL) if has_lora else None,
        q_b_proj=Linear(QL, query) if has_lora else None,
        q_proj=None if has_lora else Linear(HIDDEN, query),
        g_proj=Linear(HIDDEN, options.heads * V) if options.gate else None,
        indexer=None,
        is_sparse=False,
        topk_indices_buffer=None,
    )


@support_torch_compile
class Layers(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", options: Options) -> None:
        super().__init__()
        self.scaling = options.scaling
        sizes = (HIDDEN, options.heads, (P + R) ** -0.5, P, R, V, QL if options.q_lora else None, L)
        self.layers = nn.ModuleList(
            options.wrapper(*sizes, modules(options), vllm_config.cache_config, prefix=f"model.layers.{number}.self_attn")
            for number in range(2)
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        scaling = None
        if self.scaling:
            scaling = (1 + 0.5 * torch.log(1 + torch.floor(positions / 8)))[..., None, None]
        for layer in self.layers:
            hidden_states = hidden_states + layer(positions, hidden_states, scaling)
        return hidden_states


@dataclass(frozen=True)
class Batch:
    """Requests, each (tokens of this step, tokens in the cache before them); the first `decodes` of them are decodes."""

    requests: tuple[tuple[int, int], ...]
    decodes: int
    padding: int = 0
    metadata: bool = True
    slots: bool = True
    idle: int = 0  # of the requests, at the end: those of a full graph that nobody made, without slots

    @property
    def tokens(self) -> int:
        return sum(new for new, _ in self.requests)


class Model:
    """Two layers with weights that the seed and the options fix, and what attention saw."""

    def __init__(self, options: Options, device: str = "cpu") -> None:
        self.options, self.queries, self.device = options, [], torch.device(device)
        ops = ["none", "+rotary_embedding"] if options.in_place_rope else ["none"]
        defaults = {"mode": options.mode, "custom_ops": ops, "cudagraph_mode": "NONE"}
        compilation = CompilationConfig(**{**defaults, **options.config})
        cache = CacheConfig(cache_dtype=options.cache, block_size=BLOCK_SIZE, kv_cache_dtype_skip_layers=list(options.skipped))
        self.config = VllmConfig(compilation_config=compilation, cache_config=cache, additional_config=options.additional)
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(options.dtype)
        try:
            with set_current_vllm_config(self.config), torch.no_grad():
                with self.device:
                    self.module = Layers(vllm_config=self.config, options=options).eval().requires_grad_(False)
                self._scale_weights()
                for number, layer in enumerate(self.module.layers):
                    self._finish(layer.mla_attn, number)
        finally:
            torch.set_default_dtype(default)

    @property
    def attentions(self):
        return [layer.mla_attn for layer in self.module.layers]

    @property
    def caches(self):
        return [each.kv_cache for each in self.attentions]

    def _scale_weights(self) -> None:
        """So that values neither vanish nor grow from layer to layer."""
        for layer in self.module.modules():
            if isinstance(layer, Linear):
                layer.weight.copy_(torch.randn_like(layer.weight, dtype=torch.float32) * layer.in_features**-0.5)

    def _finish(self, attn: Any, number: int) -> None:
        """What vLLM's model runner does behind the constructor."""
        options = self.options
        attn.impl.dcp_world_size = 1
        attn.impl.supports_quant_query_input = options.fp8_query
        attn.impl.forward_mha = self._prefill
        if self.device.type == "cpu":
            attn.impl.forward_mqa = self._decode
        if options.aiter:
            attn.attn_backend = SimpleNamespace(get_name=lambda: "ROCM_AITER_MLA")
        attn.is_aiter_triton_fp8_bmm_enabled, attn.is_aiter_triton_fp4_bmm_enabled = options.bmm == "fp8", options.bmm == "fp4"
        attn.process_weights_after_loading(options.dtype)
        attn._chunked_prefill_workspace_size = 16
        for name, scale in (("_q_scale", 0.03), ("_k_scale", 0.02)):
            getattr(attn, name).fill_(scale)
        attn._k_scale_float = 0.02
        # Pages lie further apart than they are long.
        is_fp8 = attn.kv_cache_dtype == "fp8"
        dtype = torch.uint8 if is_fp8 else options.dtype
        pages = torch.zeros(BLOCKS, 1, BLOCK_SIZE + 1, L + R, dtype=dtype, device=self.device)[:, :, :BLOCK_SIZE]
        attn.bind_kv_cache(pages)
        history = torch.randn(BLOCKS, BLOCK_SIZE, L + R, generator=torch.Generator().manual_seed(number), dtype=torch.float32)
        if is_fp8:
            history = (history * 40).to(current_platform.fp8_dtype()).view(torch.uint8)
        attn.kv_cache.copy_(history)

    def run(self, batch: Batch, seed: int = 0) -> torch.Tensor:
        """Rows [T + padding, HIDDEN] of which those of the padding mean nothing."""
        generator = torch.Generator().manual_seed(seed)
        rows = batch.tokens + batch.padding
        hidden = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float32).to(self.options.dtype)
        positions = torch.zeros(rows, dtype=torch.int64)
        slots = torch.full((rows,), -1, dtype=torch.int64)
        order = torch.randperm(BLOCKS, generator=generator)  # two pages for each request
        row = 0
        for number, (new, before) in enumerate(batch.requests):
            where = torch.arange(before, before + new)
            positions[row : row + new] = where
            if number < len(batch.requests) - batch.idle:
                slots[row : row + new] = order[2 * number + where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE
            row += new
        metadata = _metadata(batch, order) if batch.metadata else None
        names = [each.layer_name for each in self.attentions]
        slot_mapping = dict.fromkeys(names, slots) if batch.slots else {}
        per_layer = dict.fromkeys(names, metadata) if metadata else None
        with set_forward_context(per_layer, self.config, num_tokens=rows, slot_mapping=slot_mapping), torch.inference_mode():
            return self.module(positions=positions, hidden_states=hidden).clone()

    def _values(self, kv_cache: torch.Tensor, blocks: torch.Tensor, tokens: int, attn: Any) -> torch.Tensor:
        """Entries of a request [tokens, L+R] in fp32."""
        where = torch.arange(tokens)
        entries = kv_cache[blocks[where // BLOCK_SIZE], where % BLOCK_SIZE]
        if entries.dtype is torch.uint8:
            entries = entries.view(current_platform.fp8_dtype())
        return entries.float() * (attn._k_scale if kv_cache.element_size() == 1 else 1.0)

    def _decode(self, query: Any, kv_cache: torch.Tensor, metadata: Any, attn: Any):
        """In place of a backend's forward_mqa: as many tokens for each request as decode.lengths says."""
        self.queries.append(query)
        q = torch.cat(query, -1) if isinstance(query, tuple) else query
        scale = attn._q_scale if q.element_size() == 1 else 1.0
        q, rows, row = q.float() * scale, [], 0
        for blocks, new, total in zip(metadata.decode.blocks, metadata.decode.new, metadata.decode.totals, strict=True):
            entries = self._values(kv_cache, blocks, total, attn)
            for token in range(new):
                seen = entries[: total - new + token + 1]
                rows.append(torch.softmax(q[row + token] @ seen.T * attn.scale, -1) @ seen[:, :L])
            row += new
        return torch.stack(rows).to(self.options.dtype), None

    def _prefill(self, q, kv_c, k_pe, kv_cache, metadata, k_scale, output, output_scale=None):
        """In place of a backend's forward_mha: what is in the cache before counts by the mean of its entries."""
        attn = self.attentions[0]
        keys, row = self.attentions[0].kv_b_proj(kv_c)[0].view(-1, attn.num_heads, P + V).float(), 0
        rotary = k_pe.float().view(-1, 1, R).expand(-1, attn.num_heads, R)
        for blocks, new, total in zip(metadata.prefill.blocks, metadata.prefill.new, metadata.prefill.totals, strict=True):
            part = slice(row, row + new)
            k = torch.cat((keys[part, :, :P], rotary[part]), -1)
            scores = torch.einsum("qhd,khd->hqk", q[part].float(), k) * attn.scale
            scores = scores.masked_fill(torch.ones(new, new).triu(1).bool(), -torch.inf)
            found = torch.einsum("hqk,khv->qhv", torch.softmax(scores, -1), keys[part, :, P:])
            before = self._values(kv_cache, blocks, total, attn).mean()
            output[part] = (found + before).reshape(new, -1).to(output.dtype)
            row += new


def _metadata(batch: Batch, order: torch.Tensor) -> SimpleNamespace:
    def part(first: int, last: int) -> SimpleNamespace | None:
        requests = batch.requests[first:last]
        blocks = [order[2 * number : 2 * number + 2] for number in range(first, last)]
        new = [each for each, _ in requests]
        return SimpleNamespace(blocks=blocks, new=new, totals=[sum(each) for each in requests]) if requests else None

    count = len(batch.requests)
    return SimpleNamespace(
        num_actual_tokens=batch.tokens,
        num_decode_tokens=sum(new for new, _ in batch.requests[: batch.decodes]),
        num_decodes=batch.decodes,
        num_prefills=count - batch.decodes,
        decode=part(0, batch.decodes),
        prefill=part(batch.decodes, count),
    )
