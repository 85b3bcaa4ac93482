"""A layer's decode prologue for one rank of DeepSeek-R1 at TP 8: by one kernel, and by plain torch to compare with.

python examples/decode_step.py        # on the GPU that torch sees; without one the program of gfx950, on the CPU
"""

import torch

import mlagen

TOKENS, BLOCKS, BLOCK_SIZE, MAX_POSITION = 8, 64, 16, 4096


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """GPT-J RoPE of x [..., R], whose neighbours are pairs, with cos and sin [..., R/2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def main() -> None:
    spec = mlagen.PrologueSpec.from_model("deepseek-r1", tp=8, q_dtype="fp8", kv_dtype="fp8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = mlagen.load(spec, device) if device == "cuda" else mlagen.load(spec, device, arch="gfx950")
    heads, nope, latent, rope = spec.heads, spec.nope_dim, spec.lora_rank, spec.rope_dim

    torch.manual_seed(0)
    bf16 = {"dtype": torch.bfloat16, "device": device}
    q = torch.randn(TOKENS, heads, nope + rope, **bf16)  # [nope | rotary], not rotated yet
    kv = torch.randn(TOKENS, latent + rope, **bf16)
    kv_c, k_pe = kv.split([latent, rope], -1)  # strides are free
    w_uk = torch.randn(heads, nope, latent, **bf16) * nope**-0.5
    angles = torch.outer(torch.arange(MAX_POSITION), 10000.0 ** (-torch.arange(0, rope, 2) / rope))
    cos_sin_cache = torch.cat((angles.cos(), angles.sin()), -1).to(**bf16)
    positions = torch.randint(MAX_POSITION, (TOKENS,), device=device)
    slot_mapping = torch.randperm(BLOCKS * BLOCK_SIZE, device=device)[:TOKENS]
    slot_mapping[-1] = -1  # padding: its row of the query is written, its cache entry is not
    kv_cache = torch.zeros(BLOCKS, BLOCK_SIZE, latent + rope, dtype=torch.uint8, device=device)
    q_scale, k_scale = (torch.tensor(scale, device=device) for scale in (0.02, 0.01))  # value = code * scale

    packed = kernel.pack_weights(w_uk)  # once, when weights are loaded
    q_out = kernel(q, kv_c, k_pe, packed, kv_cache, slot_mapping, positions, cos_sin_cache, q_scale=q_scale, k_scale=k_scale)

    cos, sin = cos_sin_cache[positions].float().chunk(2, -1)
    q_nope, q_pe = q.float().split([nope, rope], -1)
    query = torch.cat((torch.einsum("thp,hpl->thl", q_nope, w_uk.float()), rotate(q_pe, cos[:, None], sin[:, None])), -1)
    entries = torch.cat((kv_c.float(), rotate(k_pe.float(), cos, sin)), -1)
    written = kv_cache.view(q_out.dtype).flatten(0, 1)[slot_mapping[:-1]]
    for name, codes, scale, expected in (("q_out", q_out, q_scale, query), ("kv_cache", written, k_scale, entries[:-1])):
        error = (codes.float() * scale - expected).norm() / expected.norm()
        print(f"{name} {list(codes.shape)} {codes.dtype}: {100 * error:.1f} % from fp32")
        assert error < 0.04, "an fp8 code is at most a sixteenth from its value"
    print(f"by {kernel.generated.name} on {kernel.device}")


if __name__ == "__main__":
    main()
