"""Operators with the names and schemas of serving libraries, computed by plain torch, and layers that are written with them.

They stand for the libraries, which are not installed: what they do to their arguments is what the kernels' sources say.
"""

import torch
from fx_models import H, L, P, R, Spelling, V

Q_LIMIT = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 224.0}

SCHEMAS = {
    "_C": """
static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()
rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, bool is_neox, \
int rope_dim_offset=0, bool inverse=False) -> ()
""",
    "_C_cache_ops": """
concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor! kv_cache, Tensor slot_mapping, str kv_cache_dtype, Tensor scale, \
bool skip_scale=False) -> ()
concat_and_cache_mla_rope_fused(Tensor positions, Tensor! q_pe, Tensor! k_pe, Tensor kv_c, Tensor cos_sin_cache, bool is_neox, \
Tensor slot_mapping, Tensor! kv_cache, str kv_cache_dtype, Tensor kv_cache_scale) -> ()
concat_mla_q(Tensor ql_nope, Tensor q_pe, Tensor! q_out) -> ()
""",
    "sglang": """
per_tensor_quant_fp8(Tensor input, Tensor(a1!) output_q, Tensor(a2!) output_s, bool is_static=False) -> ()
""",
    "vllm": """
rocm_aiter_per_tensor_quant(Tensor(a0!) out, Tensor x, Tensor(a2!) scale, bool is_dynamic) -> ()
rocm_aiter_triton_rotary_embedding(Tensor positions, Tensor(a1!) query, Tensor(a2!) key, SymInt head_size, \
Tensor cos_sin_cache, bool is_neox, Tensor? offsets=None) -> ()
""",
    "aiter": """
static_per_tensor_quant(Tensor(a0!) out, Tensor(a1!) input, Tensor(a2!) scale) -> ()
""",
}


def static_scaled_fp8_quant(result, value, scale, group_shape=None):
    limit = Q_LIMIT[result.dtype]
    result.copy_((value.float() * scale.reciprocal()).clamp(-limit, limit).to(result.dtype))


def per_tensor_quant_fp8(value, output_q, output_s, is_static=False):
    if not is_static:
        output_s.copy_(value.float().abs().max() / Q_LIMIT[output_q.dtype])
    static_scaled_fp8_quant(output_q, value, output_s)


def static_per_tensor_quant(out, value, scale):
    limit = torch.finfo(out.dtype).max
    out.copy_((value.float() / scale).clamp(-limit, limit).to(out.dtype))


def rocm_aiter_per_tensor_quant(out, x, scale, is_dynamic):
    assert not is_dynamic
    static_per_tensor_quant(out, x, scale)


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox, rope_dim_offset=0, inverse=False):
    """In the arguments' type throughout, as the kernel computes."""
    assert not rope_dim_offset
    assert not inverse
    for each in (query, key):
        if each is None:
            continue
        cos, sin = cos_sin_cache[positions].to(each.dtype).view(len(positions), 1, -1).chunk(2, -1)
        heads = each.reshape(len(positions), -1, head_size)
        first, second = heads.chunk(2, -1) if is_neox else (heads[..., ::2], heads[..., 1::2])
        turned = first * cos - second * sin, second * cos + first * sin
        turned = torch.cat(turned, -1) if is_neox else torch.stack(turned, -1).flatten(-2)
        each.copy_(turned.view(each.shape))


def rocm_aiter_triton_rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox, offsets=None):
    assert offsets is None
    rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)


def concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, skip_scale=False):
    """A row at a time; "fp8" divides, and negative slots are left out."""
    entries = torch.cat((kv_c, k_pe.reshape(len(kv_c), -1)), -1)
    if kv_cache_dtype.startswith("fp8"):
        dtype = FLAVOUR.get(kv_cache.dtype, kv_cache.dtype)
        largest = torch.finfo(dtype).max
        entries = (entries.float() / scale).clamp(-largest, largest).to(dtype).view(kv_cache.dtype)
    for entry, slot in zip(entries, slot_mapping.tolist(), strict=True):
        if slot >= 0:
            kv_cache[slot // kv_cache.shape[1], slot % kv_cache.shape[1]] = entry


FLAVOUR = {torch.uint8: torch.float8_e4m3fn}
"""What bytes are on this machine."""


def concat_and_cache_mla_rope_fused(
    positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, slot_mapping, kv_cache, kv_cache_dtype, kv_cache_scale
):
    rotary_embedding(positions, q_pe, k_pe, cos_sin_cache.shape[1], cos_sin_cache, is_neox)
    concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, kv_cache_scale)


def concat_mla_q(ql_nope, q_pe, q_out):
    q_out.copy_(torch.cat((ql_nope, q_pe), -1))


def _register():
    """Define what no library has defined; the operators live as long as what is returned."""
    libraries = []
    for namespace, schemas in SCHEMAS.items():
        library = torch.library.Library(namespace, "FRAGMENT")
        for schema in schemas.strip().splitlines():
            name = schema.partition("(")[0]
            if not hasattr(getattr(torch.ops, namespace), name):
                library.define(schema)
                library.impl(name, globals()[name], "CPU")
        libraries.append(library)
    return libraries


_LIBRARIES = _register()


class VllmOps(Spelling):
    """As vLLM's layer with its own kernels: rotary_embedding into q and k_pe, concat_and_cache_mla, static quantisation of rows."""

    @property
    def cache_type(self):
        return "fp8" if self.fp8 else "auto"

    def rotated(self, q, k_pe, positions):
        torch.ops._C.rotary_embedding(positions, q[..., P:], k_pe, R, self.table, self.neox)

    def codes(self, query):
        if not self.fp8:
            return query
        rows = query.reshape(len(query), -1)
        result = torch.empty(rows.shape, dtype=self.fp8, device=rows.device)
        torch.ops._C.static_scaled_fp8_quant(result, rows, self.q_scale)
        return result.view(query.shape)

    def absorbed(self, q_nope):
        w_uk_t = self.kv_b.view(H, P + V, L)[:, :P]
        return torch.bmm(q_nope.transpose(0, 1), w_uk_t).transpose(0, 1)

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        k_pe = k_pe.unsqueeze(1)
        self.rotated(q, k_pe, positions)
        torch.ops._C_cache_ops.concat_and_cache_mla(kv_c, k_pe.squeeze(1), cache, slots, self.cache_type, self.k_scale)
        q_nope, q_pe = q.split([P, R], dim=-1)
        return self.codes(torch.cat((self.absorbed(q_nope), q_pe), dim=-1))


class VllmOpsNeox(VllmOps):
    """With NeoX halves, and the query quantised into a tensor of heads."""

    neox = True

    def codes(self, query):
        result = torch.empty_like(query, dtype=self.fp8)
        torch.ops._C.static_scaled_fp8_quant(result.view(len(query), -1), query.view(len(query), -1), self.q_scale)
        return result


class VllmOpsFused(VllmOps):
    """As vLLM after its own fusion of rotation and cache write."""

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        q_nope, q_pe = q.split([P, R], dim=-1)
        torch.ops._C_cache_ops.concat_and_cache_mla_rope_fused(
            positions, q_pe, k_pe, kv_c, self.table, self.neox, slots, cache, self.cache_type, self.k_scale
        )
        return self.codes(torch.cat((self.absorbed(q_nope), q_pe), dim=-1))


class VllmOpsBf16(VllmOps):
    """Nothing quantised, and vLLM's concatenation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "fp8": None})

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        self.rotated(q, k_pe, positions)
        torch.ops._C_cache_ops.concat_and_cache_mla(kv_c, k_pe, cache, slots, self.cache_type, self.k_scale)
        query = q.new_empty(len(q), H, L + R)
        torch.ops._C_cache_ops.concat_mla_q(self.absorbed(q[..., :P]), q[..., P:], query)
        return query


class AiterOps(VllmOps):
    """As vLLM with AITER's rotation and quantisation."""

    neox = True

    def rotated(self, q, k_pe, positions):
        torch.ops.vllm.rocm_aiter_triton_rotary_embedding(positions, q[..., P:], k_pe, R, self.table, self.neox)

    def codes(self, query):
        result = torch.empty_like(query, dtype=self.fp8)
        torch.ops.vllm.rocm_aiter_per_tensor_quant(result, query, self.q_scale, False)
        return result


class AiterQuant(VllmOps):
    def codes(self, query):
        result = torch.empty_like(query, dtype=self.fp8)
        torch.ops.aiter.static_per_tensor_quant(result, query, self.q_scale)
        return result


class SglangOps(VllmOps):
    """The quantisations by SGLang's operator, the cache by index."""

    def quantized(self, x, scale):
        rows = x.reshape(len(x), -1)
        result = torch.empty(rows.shape, dtype=self.fp8, device=x.device)
        torch.ops.sglang.per_tensor_quant_fp8(rows, result, scale, True)
        return result.view(x.shape)

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        self.rotated(q, k_pe, positions)
        cache.view(-1, L + R)[slots] = self.stored(torch.cat((kv_c, k_pe), -1))
        return self.quantized(torch.cat((self.absorbed(q[..., :P]), q[..., P:]), -1), self.q_scale)


SPELLINGS = {each.__name__: each for each in (VllmOps, VllmOpsNeox, VllmOpsFused, VllmOpsBf16, AiterOps, AiterQuant, SglangOps)}
