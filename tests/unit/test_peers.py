"""The peers: what they compute on the CPU, how they are called, and how they are recognised."""

import importlib
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clock import measured
from helpers import small_spec

from mlagen import cli_bench
from mlagen.errors import RequestError
from mlagen.peers import aiter_triton
from mlagen.peers.operators import rotate
from mlagen.peers.registry import PEERS, chosen_peers
from mlagen.target import TARGETS
from mlagen.timing.workload import SCALE, make_workload

SPECS = {
    "plain": small_spec(),
    "absorbed": small_spec(weight="none"),
    "neox": small_spec(rope_style="neox", dtype="fp16"),
    "unrotated": small_spec(rope_style="none"),
    "no RoPE columns": small_spec(rope_style="none", rope_dim=0),
    "model dtypes": small_spec(q_dtype="bf16", kv_dtype="bf16"),
    "fp8 cache": small_spec(q_dtype="bf16", rounding="stepwise"),
    "limited": small_spec(fp8_max=224.0),
    "rope first": small_spec(nope_first=False),
}
POWERS_OF_TWO = small_spec(lora_rank=128)


# torch


@pytest.mark.parametrize("arch", ["gfx942", "sm_90"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_eager_operators_are_right(spec, arch):
    assert not measured("eager", spec, arch).failures


@pytest.mark.parametrize("name", [name for name in PEERS if name != "bmm"])
def test_no_peer_has_several_kv_heads(name):
    for arch in ("gfx950", "sm_90"):
        assert PEERS[name].misfit(replace(POWERS_OF_TWO, kv_heads=2), TARGETS[arch]) == "it has one KV head"


@pytest.mark.parametrize("layout", ["segmented", "fp8_ds_mla"])
@pytest.mark.parametrize("name", [name for name in PEERS if name != "bmm"])
def test_no_peer_has_another_cache(name, layout):
    for arch in ("gfx950", "sm_90"):
        assert PEERS[name].misfit(replace(POWERS_OF_TWO, kv_layout=layout), TARGETS[arch]) == "its cache is paged"


def test_the_product_is_right():
    assert not measured("bmm", SPECS["plain"], "gfx950").failures


def test_torch_compile_needs_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert PEERS["compile"].missing(TARGETS["sm_90"]) == PEERS["bmm+compile"].missing(TARGETS["sm_90"]) == "triton"


# FlashInfer, as its documentation describes it


def rope_quantize_fp8_append_paged_kv_cache(
    q_rope, k_rope, q_nope, k_nope, v, cos_sin_cache, pos_ids, paged_kv_cache, kv_indices, kv_indptr, batch_indices, positions,
    is_neox=True, quantize_dtype=None, quant_scale_q=1.0, quant_scale_kv=1.0, page_size=16, kv_layout="NHD", q_rope_out=None,
    q_nope_out=None, enable_pdl=False,
):  # fmt: skip
    assert v is None
    assert cos_sin_cache.dtype is torch.float32
    assert {each.dtype for each in (pos_ids, kv_indices, kv_indptr, batch_indices, positions)} == {torch.int32}
    cos, sin = cos_sin_cache[pos_ids].chunk(2, -1)
    style = "neox" if is_neox else "gptj"
    q_rope_out.copy_((rotate(q_rope, cos[:, None], sin[:, None], style).float() * quant_scale_q).to(quantize_dtype))
    q_nope_out.copy_((q_nope.float() * quant_scale_q).to(quantize_dtype))
    pages = kv_indices[kv_indptr[batch_indices] + positions // page_size]
    for cache, values in zip(paged_kv_cache, (k_nope, rotate(k_rope, cos, sin, style)), strict=True):
        codes = (values.float() * quant_scale_kv).to(quantize_dtype).view(torch.uint8)
        cache.view(torch.uint8)[pages, positions % page_size] = codes


FLASHINFER = ("plain", "absorbed", "neox", "rope first")


@pytest.fixture
def flashinfer(monkeypatch):
    package, rope = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.rope")
    rope.rope_quantize_fp8_append_paged_kv_cache = rope_quantize_fp8_append_paged_kv_cache
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.rope", rope)


@pytest.mark.parametrize("spec", [SPECS[name] for name in FLASHINFER], ids=FLASHINFER)
def test_flashinfer_is_called_right(spec, flashinfer):
    assert not measured("bmm+flashinfer", spec, "sm_90").failures


@pytest.mark.parametrize(
    ("spec", "arch", "reason"),
    [
        ("plain", "sm_90", ""),
        ("plain", "gfx942", "it has no fp8_e4m3fnuz"),
        ("model dtypes", "sm_90", "query and cache must be fp8"),
        ("fp8 cache", "sm_90", "query and cache must be fp8"),
        ("unrotated", "sm_90", "it always rotates"),
    ],
)
def test_what_flashinfer_cannot_do(spec, arch, reason):
    assert PEERS["bmm+flashinfer"].misfit(SPECS[spec], TARGETS[arch]) == reason


# AITER


def fused_qk_rope_concat_and_cache_mla(
    q_nope, q_pe, kv_c, k_pe, kv_cache, q_out, slot_mapping, k_scale, q_scale, positions, cos_cache, sin_cache, is_neox,
    is_nope_first, compute_all_q_rope=False,
):  # fmt: skip
    assert {slot_mapping.dtype, positions.dtype} == {torch.int64}
    assert kv_cache.shape[1] == 1
    cos, sin = cos_cache[positions].float(), sin_cache[positions].float()
    style = "neox" if is_neox else "gptj"
    order = 1 if is_nope_first else -1
    query = torch.cat((q_nope, rotate(q_pe, cos[:, None], sin[:, None], style))[::order], -1).float()
    entry = torch.cat((kv_c, rotate(k_pe, cos, sin, style))[::order], -1).float()
    q_out.copy_((query / q_scale if q_out.dtype.itemsize == 1 else query).to(q_out.dtype))
    codes = (entry / k_scale if kv_cache.dtype.itemsize == 1 else entry).to(kv_cache.dtype)
    kv_cache[:, 0].view(torch.uint8)[slot_mapping] = codes.view(torch.uint8)


def fused_fp8_bmm_rope_cat_and_cache_mla(
    q_nope, w_k, w_k_scale, q_pe, k_nope, k_rope, kv_cache, slot_mapping, positions, cos, sin, group_size=128, transpose_bm=True,
    config=None, k_scale=None, is_neox=False, q_out_dtype=torch.bfloat16, num_decode_toks_for_zeros=0,
):  # fmt: skip
    latent = torch.bmm(q_nope.float(), w_k.float().transpose(1, 2) * w_k_scale).transpose(0, 1).to(q_out_dtype)
    q_out = torch.empty(*latent.shape[:2], kv_cache.shape[-1], dtype=q_out_dtype)
    k_scale = torch.ones(1) if k_scale is None else k_scale
    fused_qk_rope_concat_and_cache_mla(
        latent, q_pe, k_nope[:, 0], k_rope[:, 0], kv_cache, q_out, slot_mapping, k_scale, None, positions, cos, sin, is_neox, True
    )
    return q_out, None, None, None


def package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


AITER = {
    "aiter/__init__.py": "from test_peers_of_aiter import fused_qk_rope_concat_and_cache_mla\n",
    "aiter/ops/__init__.py": "",
    "aiter/ops/triton/__init__.py": "",
    "aiter/ops/triton/fusions/__init__.py": "",
    "aiter/ops/triton/fusions/fused_bmm_rope_kv_cache.py": (
        "from test_peers_of_aiter import fused_fp8_bmm_rope_cat_and_cache_mla\n"
    ),
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts packages where Python finds them for the time of a test."""
    kept = dict(sys.modules)
    operators = types.ModuleType("test_peers_of_aiter")
    operators.fused_qk_rope_concat_and_cache_mla = fused_qk_rope_concat_and_cache_mla
    operators.fused_fp8_bmm_rope_cat_and_cache_mla = fused_fp8_bmm_rope_cat_and_cache_mla
    monkeypatch.setitem(sys.modules, "test_peers_of_aiter", operators)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda files: package(tmp_path, files)
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter" and name not in kept]:
        del sys.modules[name]
    importlib.invalidate_caches()


HIP, TRITON = PEERS["bmm+aiter"], PEERS["aiter-triton"]


@pytest.mark.parametrize(
    ("files", "hip", "triton"),
    [
        pytest.param(AITER, "", "", id="AITER"),
        pytest.param({"aiter/__init__.py": "def anext(): ...\n"}, "unrelated", "unrelated", id="PyPI's aiter"),
        pytest.param({"aiter.py": ""}, "unrelated", "unrelated", id="a module"),
        pytest.param({"aiter/setup.py": ""}, "uninstalled", "uninstalled", id="a folder"),
        pytest.param({"aiter/__init__.py": "", "aiter/ops/__init__.py": ""}, "outdated", "outdated", id="an AITER without them"),
        pytest.param({**AITER, "aiter/__init__.py": "raise OSError('no library')"}, "broken", "broken", id="it does not load"),
        pytest.param({**AITER, "aiter/__init__.py": "import no_such_module"}, "broken", "broken", id="it lacks a module"),
    ],
)
def test_aiter_is_known_by_its_operators(files, hip, triton, install):
    install(files)
    assert (HIP.missing(TARGETS["gfx942"]), TRITON.missing(TARGETS["gfx942"])) == (hip, triton)


def test_no_aiter_at_all(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiter", None)
    monkeypatch.delenv("AITER_ROOT", raising=False)
    assert HIP.missing(TARGETS["gfx950"]) == TRITON.missing(TARGETS["gfx950"]) == "uninstalled"
    assert HIP.missing(TARGETS["sm_90"]) == "AMD-only"
    assert TRITON.missing(TARGETS["sm_90"]) == "AITER_ROOT"


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("spec", [POWERS_OF_TWO, replace(POWERS_OF_TWO, rope_style="neox", q_dtype="bf16", kv_dtype="bf16")])
def test_aiter_is_called_right(spec, arch, install):
    install(AITER)
    assert not measured("bmm+aiter", spec, arch).failures
    assert not measured("aiter-triton", spec, arch).failures


@pytest.mark.parametrize("spec", ["absorbed", "rope first"])
def test_aiters_hip_kernel_takes_an_absorbed_query_and_either_order(spec, install):
    install(AITER)
    assert not measured("bmm+aiter", SPECS[spec], "gfx950").failures


@pytest.mark.parametrize(
    ("peer", "spec", "reason"),
    [
        (HIP, SPECS["plain"], ""),
        (HIP, SPECS["unrotated"], "it always rotates"),
        (HIP, small_spec(kv_dtype="bf16"), "an fp8 query needs an fp8 cache"),
        (TRITON, POWERS_OF_TWO, ""),
        (TRITON, SPECS["plain"], "L and R must be powers of two"),
        (TRITON, SPECS["absorbed"], "it always absorbs"),
        (TRITON, SPECS["unrotated"], "it always rotates"),
        (TRITON, replace(POWERS_OF_TWO, nope_first=False), "its rotary columns are the last"),
    ],
)
def test_what_aiter_cannot_do(peer, spec, reason):
    assert peer.misfit(spec, TARGETS["gfx950"]) == reason


CHECKOUT = {
    "aiter/__init__.py": "raise OSError('this is for AMD')",
    "aiter/ops/triton/utils/_triton/arch_info.py": "_CACHED_ARCH = None",
    "aiter/ops/triton/fusions/fused_bmm_rope_kv_cache.py": """
import test_peers_of_aiter
from aiter.ops.triton.utils._triton import arch_info
assert arch_info._CACHED_ARCH == "gfx942"

class Kernel:
    def __getitem__(self, grid):
        def launch(**options):
            assert set(options) == {"BLOCK_SIZE_M", "BLOCK_SIZE_N", "GROUP_SIZE_M", "num_warps", "num_stages", "cache_modifier"}
        return launch

_fused_fp8_bmm_rope_cat_and_cache_mla_kernel = Kernel()

def fused_fp8_bmm_rope_cat_and_cache_mla(*arguments, config, **options):
    _fused_fp8_bmm_rope_cat_and_cache_mla_kernel[(1,)](**config)
    return test_peers_of_aiter.fused_fp8_bmm_rope_cat_and_cache_mla(*arguments, **options)
""",
}


def test_aiters_triton_kernel_runs_from_a_checkout_where_aiter_does_not(install, tmp_path, monkeypatch):
    install({})
    package(tmp_path / "checkout", CHECKOUT)
    monkeypatch.setenv("AITER_ROOT", os.fspath(tmp_path / "checkout"))
    assert TRITON.missing(TARGETS["sm_90"]) == ""
    assert not measured("aiter-triton", POWERS_OF_TWO, "sm_90").failures


@pytest.mark.parametrize(("tokens", "count"), [(1, 6), (16, 6), (32, 12), (256, 18)])
def test_tiles_suit_the_tokens(tokens, count):
    assert len(aiter_triton._tiles(tokens)) == count


# Choosing


def test_peers_are_chosen_by_name():
    assert [peer.name for peer in chosen_peers("all")] == list(PEERS)
    assert chosen_peers("none") == []
    assert [peer.name for peer in chosen_peers("bmm, eager,bmm")] == ["eager", "bmm"]


@pytest.mark.parametrize("names", ["", "aiter", "eager,", "all,eager"])
def test_peers_that_there_are_none_of(names):
    with pytest.raises(RequestError, match=r"--peers .*: possible are all, none, and of eager, compile, "):
        chosen_peers(names)


def test_the_help_names_every_peer():
    assert ", ".join(PEERS) in cli_bench.PEERS_HELP


def test_the_scale_keeps_clear_of_saturation_and_of_rounding():
    work = make_workload(small_spec(), TARGETS["gfx942"], 256, 1, device="cpu")
    assert float(work.kv_c.abs().max()) / SCALE < TARGETS["gfx942"].fp8.largest / 2
    assert float(work.q_scale) == SCALE
