"""W_UK in AITER's forms, which vLLM makes in process_weights_after_loading."""

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.host]


@pytest.fixture
def aiter_bmm(toy, monkeypatch):
    """AITER's products of the stock path, in torch: what W_K and W_V mean, without the rounding of activations."""
    from vllm._aiter_ops import rocm_aiter_ops
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.model_executor.layers.quantization.quark import utils

    from mlagen.quantization import quantize_weights
    from mlagen.spec import PrologueSpec

    def quantize(weight):
        """AITER's: groups of the last dimension [..., K] to e2m1 pairs [..., K/2] and e8m0 scales [..., K/32]."""
        flat = weight.reshape(-1, weight.shape[-1]).T[None]  # ours are of the dimension before the last
        spec = PrologueSpec(1, flat.shape[1], flat.shape[2], 0, "none", weight="mxfp4")
        codes = quantize_weights(flat.contiguous(), spec, torch.float8_e4m3fn)
        return tuple(each[0].T.reshape(*weight.shape[:-1], -1).contiguous() for each in (codes.w_uk, codes.scale))

    def fp8_product(x, w, scale, group_size=128, transpose_bm=True, YQ=None):
        if warming:
            return None
        return write(torch.bmm(x.float(), w.float().mT * scale), YQ, x.dtype)

    def fp4_product(x, w, scale, out=None, transpose_bm=True, prequant=True, y_scale=None):
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        codes = torch.stack((w & 15, w >> 4), -1).flatten(-2)
        scales = torch.exp2(scale.float() - 127).repeat_interleave(32, -1)
        return write(torch.bmm(x.float(), (values[codes.int()] * scales).mT), out, x.dtype)

    def write(product, out, dtype):
        product = product.transpose(0, 1).to(dtype)
        return product if out is None else out.copy_(product)

    # vLLM compiles AITER's fp8 kernel for a thousand batch sizes while it loads: nothing to compute.
    stock, warming = MLAAttention.process_weights_after_loading, []

    def process_weights_after_loading(attn, act_dtype):
        warming.append(attn)
        stock(attn, act_dtype)
        warming.clear()

    monkeypatch.setattr(MLAAttention, "process_weights_after_loading", process_weights_after_loading)
    monkeypatch.setattr(rocm_aiter_ops, "triton_fp8_bmm", fp8_product)
    monkeypatch.setattr(rocm_aiter_ops, "batched_gemm_a16wfp4", fp4_product)
    monkeypatch.setattr(utils, "quark_quantize_weight_to_mxfp4", quantize)


@pytest.mark.parametrize("cache", ["fp8", "auto"])
@pytest.mark.parametrize("bmm", ["fp8", "fp4"])
def test_decodes_with_codes_as_they_are(build, toy, aiter_bmm, bmm, cache, said):
    """The kernel multiplies the codes that the stock path has, by activations that it does not round."""
    options = toy.Options(bmm=bmm, cache=cache)
    stock, ours = build(options, plugin=False), build(options)
    assert ours.attentions[0].mlagen.decode.kernel.spec.weight == {"fp8": "fp8", "fp4": "mxfp4"}[bmm]
    batch = toy.Batch(((1, 5), (1, 17)), 2, padding=1)
    expected, found = stock.run(batch)[:2], ours.run(batch)[:2]
    assert (expected.float() - found.float()).abs().max() <= 8 * 2**-7 * expected.float().abs().max()
    of_stock, of_ours = (torch.cat(each, -1) if isinstance(each, tuple) else each for each in (stock.queries[0], ours.queries[0]))
    of_stock, of_ours = of_stock.float(), of_ours.float()
    step = 2**-3 if cache == "fp8" else 2**-6
    assert ((of_stock - of_ours).abs() <= step * of_stock.abs().clamp(min=of_stock.abs().mean())).all()
    assert [line for line in said if "is fused" in line]


def test_a_mixed_batch_still_has_vllms_form(build, toy, aiter_bmm):
    options, batch = toy.Options(bmm="fp8"), toy.Batch(((1, 5), (4, 2)), 1)
    stock, ours = build(options, plugin=False), build(options)
    assert torch.equal(stock.run(batch), ours.run(batch))


def test_weights_are_a_view_of_kv_b_proj(build, toy):
    """As they are in 16 bits: with the value's rows between those of the heads."""
    ours = build(toy.Options())
    w_uk = ours.attentions[0].W_UK_T
    assert w_uk.stride() == ((toy.P + toy.V) * toy.L, toy.L, 1)
    assert w_uk.data_ptr() == ours.attentions[0].kv_b_proj.weight.data_ptr()
