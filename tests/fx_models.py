"""A small DeepSeek-style attention layer, its prologue written in the ways of the field.

Every spelling computes the same: q_out [T,H,L+R] in the fp8 of the layer, the cache written at slot_mapping, and an attention of
dense products over the whole cache, so that a second layer depends on the first.
"""

import math

import torch
from torch import nn

H, P, L, R, V = 2, 32, 64, 16, 16
HIDDEN, BLOCKS, BLOCK_SIZE, MAX_POSITION = 32, 20, 16, 64
SLOTS = BLOCKS * BLOCK_SIZE


def rope_table(*, yarn: bool = False) -> torch.Tensor:
    """[MAX_POSITION, R] = [cos | sin] in fp32; with `yarn`, frequencies and magnitude as DeepSeek's long context has them."""
    inverse = 1.0 / 10000 ** (torch.arange(0, R, 2).float() / R)
    magnitude = 1.0
    if yarn:
        ramp = torch.linspace(0, 1, R // 2)
        inverse = inverse / 40 * ramp + inverse * (1 - ramp)
        magnitude = 0.1 * 0.707 * math.log(40) + 1.0
    angles = torch.arange(MAX_POSITION).float()[:, None] * inverse
    return torch.cat((angles.cos() * magnitude, angles.sin() * magnitude), -1)


def quantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Static quantisation: the product with the reciprocal, clamped to what the format holds."""
    if not dtype.is_floating_point or dtype.itemsize > 1:
        return x
    largest = torch.finfo(dtype).max
    return (x.float() * scale.reciprocal()).clamp(-largest, largest).to(dtype)


class Spelling(nn.Module):
    """One layer.  A subclass says how the prologue is written."""

    neox = False
    table_dtype = torch.float32

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16, fp8: torch.dtype | None = torch.float8_e4m3fn,
                 yarn: bool = False) -> None:  # fmt: skip
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            values = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
            return nn.Parameter(values.to(dtype), requires_grad=False)

        self.q_proj, self.kv_a = weight(H * (P + R), HIDDEN), weight(L + R, HIDDEN)
        self.kv_b, self.o_proj = weight(H * (P + V), L), weight(HIDDEN, H * V)
        self.fp8, self.dtype = fp8, dtype
        self.register_buffer("table", rope_table(yarn=yarn).to(self.table_dtype))
        self.register_buffer("q_scale", torch.tensor(0.02))
        self.register_buffer("k_scale", torch.tensor(0.03))

    def inputs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T,H,P+R], the normalised latent [T,L] and k_pe [T,R]."""
        q = nn.functional.linear(x, self.q_proj).view(-1, H, P + R)
        latent, k_pe = nn.functional.linear(x, self.kv_a).split([L, R], dim=-1)
        wide = latent.float()
        kv_c = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(self.dtype)
        return q, kv_c, k_pe

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        """q_out, and the cache written."""
        raise NotImplementedError

    def attend(self, q_out: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        entries = cache.view(self.fp8).reshape(SLOTS, L + R) if self.fp8 else cache.reshape(SLOTS, L + R)
        q, k = q_out.float() * self.q_scale, entries.float() * self.k_scale
        scores = torch.softmax(torch.einsum("thd,sd->ths", q, k) / math.sqrt(P + R), -1)
        values = self.kv_b.view(H, P + V, L)[:, P:]
        out = torch.einsum("ths,sl,hvl->thv", scores, k[:, :L], values.float())
        return out.flatten(1).to(self.dtype) @ self.o_proj.t()

    def forward(self, x, cache, slots, positions):
        q, kv_c, k_pe = self.inputs(x)
        q_out = self.prologue(q, kv_c, k_pe, cache, slots, positions)
        return x + self.attend(q_out, cache), q_out

    def quantized(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return quantize(x, scale, self.fp8) if self.fp8 else x

    def stored(self, entry: torch.Tensor) -> torch.Tensor:
        """An entry as the cache holds it: fp8 as bytes."""
        return self.quantized(entry, self.k_scale).view(torch.uint8) if self.fp8 else entry


class DeepSeek(Spelling):
    """As DeepSeek's inference code: complex rotation, W_UK a view of kv_b_proj, einsum; here with a joined, paged cache."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        cos, sin = self.table.chunk(2, -1)
        self.register_buffer("freqs_cis", torch.complex(cos, sin))

    def rotate(self, x, freqs):
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs.view(x.size(0), 1, x.size(-1) // 2)).flatten(2).to(x.dtype)

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        freqs = self.freqs_cis[positions]
        q_nope, q_pe = torch.split(q, [P, R], dim=-1)
        q_pe = self.rotate(q_pe, freqs)
        k_pe = self.rotate(k_pe.unsqueeze(1), freqs).squeeze(1)
        wkv_b = self.kv_b.view(H, -1, L)
        q_nope = torch.einsum("thd,hdc->thc", q_nope, wkv_b[:, :P])
        cache.view(SLOTS, L + R)[slots] = self.stored(torch.cat([kv_c, k_pe], -1))
        return self.quantized(torch.cat([q_nope, q_pe], -1), self.q_scale)


class HuggingFace(Spelling):
    """As modeling_deepseek_v3 with the weights absorbed: [batch, head, 1, dim], rotate_half after undoing the interleaving."""

    interleave = False
    neox = True

    def tables(self, positions):
        cos, sin = self.table[positions].to(self.dtype).chunk(2, -1)
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def rotate(self, x, cos, sin):
        if self.interleave:
            b, h, s, d = x.shape
            x = x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d)
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        cos, sin = (each[:, None, None, :] for each in self.tables(positions))
        q_nope, q_pe = torch.split(q.unsqueeze(1).transpose(1, 2), [P, R], dim=-1)  # [T,H,1,.]
        k_rot = k_pe.view(-1, 1, 1, R)
        q_pe, k_rot = self.rotate(q_pe, cos, sin), self.rotate(k_rot, cos, sin)
        w_uk = self.kv_b.view(H, P + V, L)[:, :P]
        absorbed = torch.matmul(q_nope.squeeze(2).transpose(0, 1), w_uk).transpose(0, 1)
        query = torch.cat((absorbed, q_pe.squeeze(2)), dim=-1)
        entry = torch.cat((kv_c, k_rot.reshape(-1, R)), dim=-1)
        cache.view(SLOTS, L + R).index_copy_(0, slots, self.stored(entry))
        return self.quantized(query, self.q_scale)


class Vllm(Spelling):
    """As vLLM's layer with its native rotary embedding, in place into q: chunk, two products, stack."""

    def rotate(self, x, cos_sin):
        cos, sin = (each.unsqueeze(-2).to(x.dtype) for each in cos_sin.chunk(2, dim=-1))
        if self.neox:
            first, second = torch.chunk(x, 2, dim=-1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        first, second = x[..., ::2], x[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        cos_sin = self.table.index_select(0, positions)
        q = q.clone()
        q[..., P:] = self.rotate(q[..., P:], cos_sin)
        k_pe = self.rotate(k_pe.unsqueeze(1), cos_sin)
        q_nope, q_pe = q.split([P, R], dim=-1)
        w_uk_t = self.kv_b.view(H, P + V, L)[:, :P]
        ql_nope = torch.bmm(q_nope.transpose(0, 1), w_uk_t).transpose(0, 1)
        cache[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = self.stored(torch.cat((kv_c, k_pe.squeeze(1)), dim=-1))
        return self.quantized(torch.cat((ql_nope, q_pe), dim=-1), self.q_scale)


class VllmNeox(Vllm):
    neox = True


class Sglang(Spelling):
    """As SGLang's forward_absorb: bmm into a transposed result, a buffer filled by parts, slots of which none is negative."""

    def rotate(self, x, cos, sin):
        real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((real * cos - imaginary * sin, imaginary * cos + real * sin), -1).flatten(-2).to(x.dtype)

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        cos, sin = (each.unsqueeze(1) for each in self.table[positions].float().chunk(2, -1))
        q_nope, q_pe = q.split([P, R], dim=-1)
        w_kc = self.kv_b.unflatten(0, (-1, P + V)).split([P, V], dim=1)[0]
        q_input = q.new_empty(q.shape[0], H, L + R)
        q_input[..., :L] = torch.bmm(q_nope.transpose(0, 1), w_kc).transpose(0, 1)
        q_input[..., L:] = self.rotate(q_pe, cos, sin)
        k_input = torch.cat((kv_c.unsqueeze(1), self.rotate(k_pe.unsqueeze(1), cos, sin)), -1)
        cache.view(SLOTS, 1, L + R)[slots] = self.stored(k_input)
        return self.quantized(q_input, self.q_scale)


class Einsum(Vllm):
    """All contractions as einsum, W_UK stored [L, H, P]."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        w_uk = self.kv_b.view(H, P + V, L)[:, :P].permute(2, 0, 1).contiguous()
        self.w_uk = nn.Parameter(w_uk, requires_grad=False)

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        cos_sin = self.table[positions]
        ql_nope = torch.einsum("thp,lhp->thl", q[..., :P], self.w_uk)
        query = torch.cat((ql_nope, self.rotate(q[..., P:], cos_sin)), -1)
        entry = torch.cat((kv_c, self.rotate(k_pe[:, None], cos_sin)[:, 0]), -1)
        cache.view(-1, L + R).index_put_((slots,), self.stored(entry))
        return self.quantized(query, self.q_scale)


class Matmul(Vllm):
    """Plain matmul over [T,H,1,P], and the quantisation by division."""

    neox = True

    def quantized(self, x, scale):
        if not self.fp8:
            return x
        largest = torch.finfo(self.fp8).max
        return torch.clamp(x.float() / scale, min=-largest, max=largest).to(self.fp8)

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        cos_sin = self.table[positions]
        w_uk = self.kv_b.view(H, P + V, L)[:, :P]
        ql_nope = (q[:, :, None, :P] @ w_uk).squeeze(2)
        query = torch.cat((ql_nope, self.rotate(q[..., P:], cos_sin)), -1)
        entry = torch.cat((kv_c, self.rotate(k_pe[:, None], cos_sin)[:, 0]), -1)
        cache.flatten(0, 1)[slots] = self.stored(entry)
        return self.quantized(query, self.q_scale)


class HuggingFaceInterleaved(HuggingFace):
    interleave = True


class Baddbmm(Einsum):
    """A baddbmm that adds nothing, and numbers of the model's dtype in the cache."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{**kwargs, "fp8": None})

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        cos_sin = self.table[positions]
        w_uk = self.w_uk.permute(1, 2, 0)
        nothing = q.new_zeros(H, q.shape[0], L)
        ql_nope = torch.baddbmm(nothing, q[..., :P].transpose(0, 1), w_uk, beta=0).transpose(0, 1)
        entry = torch.cat((kv_c, self.rotate(k_pe[:, None], cos_sin)[:, 0]), -1)
        cache.view(-1, L + R)[slots] = entry
        return torch.cat((ql_nope, self.rotate(q[..., P:], cos_sin)), -1)


SPELLINGS = {
    each.__name__: each for each in (DeepSeek, HuggingFace, HuggingFaceInterleaved, Vllm, VllmNeox, Sglang, Einsum, Matmul, Baddbmm)
}


def new_cache(layer: Spelling) -> torch.Tensor:
    dtype = torch.uint8 if layer.fp8 else layer.dtype
    return torch.zeros((BLOCKS, BLOCK_SIZE, L + R), dtype=dtype)


def batch(tokens: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16):
    """x [T,HIDDEN], slot_mapping [T] without repetition, positions [T]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((tokens, HIDDEN), generator=generator).to(dtype)
    slots = torch.randperm(SLOTS, generator=generator)[:tokens]
    return x, slots, torch.randint(0, MAX_POSITION, (tokens,), generator=generator)
