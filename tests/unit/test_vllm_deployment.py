"""What a command line of vLLM says of the kernels that it needs."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlagen.errors import MlagenError, ModelError, RequestError
from mlagen.integrations.vllm.command import parse_command
from mlagen.integrations.vllm.deployment import ALIASES, deployment_requests, preset_name
from mlagen.models import PRESETS
from mlagen.target import TARGETS

GFX942, GFX950 = TARGETS["gfx942"], TARGETS["gfx950"]
CONFIG = {
    "model_type": "deepseek_v3", "num_attention_heads": 16, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
    "v_head_dim": 64, "torch_dtype": "float16",
}  # fmt: skip


def outputs(text, target=GFX950):
    """(q_dtype, kv_dtype, q_split) of each kernel."""
    specs = [each.spec for each in deployment_requests(text, [target])]
    assert len(set(specs)) == len(specs)
    return [(each.q_dtype, each.kv_dtype, each.q_split) for each in specs]


@pytest.mark.parametrize(
    ("text", "kernels"),
    [
        ("-tp 8 --kv-cache-dtype fp8", {("fp8", "fp8", False), ("bf16", "fp8", False)}),
        ("-tp 8 --kv-cache-dtype fp8_e4m3 --attention-backend ROCM_AITER_MLA", {("fp8", "fp8", False)}),
        ("-tp 8 --kv-cache-dtype fp8 --attention-backend TRITON_MLA", {("bf16", "fp8", False)}),
        ("-tp 8 --kv-cache-dtype bfloat16", {("bf16", "bf16", False)}),
        ("-tp 16 --kv-cache-dtype bfloat16", {("bf16", "bf16", True), ("bf16", "bf16", False)}),
        ("-tp 16 --kv-cache-dtype bfloat16 --attention-backend rocm_aiter_mla", {("bf16", "bf16", True)}),
        ("-tp 8", {("fp8", "fp8", False), ("bf16", "fp8", False), ("bf16", "bf16", False)}),
        ("-tp 8 --dtype half --kv-cache-dtype float16", {("fp16", "fp16", False)}),
    ],
)
def test_kernels_of_a_deployment(text, kernels):
    found = outputs(f"deepseek-ai/DeepSeek-R1 {text}")
    assert set(found) == kernels
    assert len(found) == len(kernels)


def test_the_whole_command_with_what_has_nothing_to_do_with_kernels():
    text = (
        "MLAGEN_VLLM=1 VLLM_ROCM_USE_AITER=1 vllm serve 'deepseek-ai/DeepSeek-R1' --tensor_parallel_size=8 --port 8000 "
        """--speculative-config '{"method": "mtp", "num_speculative_tokens": 2}' --kv-cache-dtype fp8 --enable-expert-parallel"""
    )
    command = parse_command(text)
    assert (command.model, command.tp, command.kv_cache_dtype) == ("deepseek-ai/DeepSeek-R1", 8, "fp8")
    assert parse_command("--port 8000 --model a -tp=2").model == "a"


@pytest.mark.parametrize(
    ("variables", "arch", "weights"),
    [
        ("", "gfx942", ["bf16"]),
        ("VLLM_ROCM_USE_AITER_FP8BMM=1", "gfx942", ["bf16"]),  # vLLM's switch for all of AITER is off
        ("VLLM_ROCM_USE_AITER=1 VLLM_ROCM_USE_AITER_FP8BMM=1", "gfx942", ["fp8"]),
        ("VLLM_ROCM_USE_AITER=1 VLLM_ROCM_USE_AITER_FP4BMM=1", "gfx942", ["bf16"]),
        # vLLM takes fp4 only where kv_b_proj is in bf16, which the command does not say
        ("VLLM_ROCM_USE_AITER=1 VLLM_ROCM_USE_AITER_FP4BMM=True", "gfx950", ["mxfp4", "bf16"]),
    ],
)
def test_aiters_weights(variables, arch, weights):
    text = f"{variables} vllm serve deepseek-r1 -tp 8 --kv-cache-dtype fp8 --attention-backend ROCM_AITER_MLA"
    found = deployment_requests(text, [TARGETS[arch]])
    assert [each.spec.weight for each in found] == weights
    assert {each.spec.fp8_max for each in found} == {224.0 if arch == "gfx942" else None}


def test_a_limit_below_the_formats_is_an_fp8_querys():
    found = deployment_requests("deepseek-r1 -tp 8 --kv-cache-dtype fp8", [GFX942])
    assert {(each.spec.q_dtype, each.spec.fp8_max) for each in found} == {("fp8", 224.0), ("bf16", None)}


def test_a_folder_with_a_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (one,) = deployment_requests(f"{tmp_path} -tp 2 --kv-cache-dtype float16 --attention-backend TRITON_MLA", [GFX942])
    assert (one.spec.heads, one.spec.lora_rank, one.spec.dtype, one.tp) == (8, 256, "fp16", 2)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "index_topk": 2048}))
    with pytest.raises(RequestError, match="sparse"):
        deployment_requests(str(tmp_path), [GFX942])


@pytest.mark.parametrize(
    ("repository", "preset"),
    [
        ("deepseek-ai/DeepSeek-R1", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1"),
        ("amd/DeepSeek-R1-MXFP4-Preview", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-V3.1-Terminus", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-v2-lite"),
        ("moonshotai/Kimi-K2-Instruct-0905", "kimi-k2"),
        ("moonshotai/Kimi-K2.5", "kimi-k2"),
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", "kimi-linear"),
        ("deepseek-r1", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", None),  # no MLA
        ("deepseek-ai/DeepSeek-V2.5", None),
    ],
)
def test_repositories(repository, preset):
    assert preset_name(repository) == preset
    assert set(ALIASES.values()) <= set(PRESETS)


@pytest.mark.parametrize(
    ("text", "error", "word"),
    [
        ("", RequestError, "no model"),
        ("--tensor-parallel-size 8", RequestError, "no model"),
        ("--port 8000 deepseek-r1", RequestError, "begin with it"),
        ("'deepseek-r1", RequestError, "no closing quotation; check its quotes"),
        ("deepseek-r1 -tp eight", RequestError, "invalid int value: 'eight'"),
        ("deepseek-r1 -tp", RequestError, "expected one argument"),
        ("deepseek-r1 -tp 3", ModelError, "tp is 3, but must divide"),
        ("deepseek-r1 --dtype float32", RequestError, "invalid choice: 'float32'"),
        ("deepseek-r1 --kv-cache-dtype fp8_e5m2", RequestError, "--kv-cache-dtype fp8_e5m2 keeps vLLM's own path"),
        ("deepseek-r1 --kv-cache-dtype float16", RequestError, "with a model in bfloat16"),
        ("deepseek-r1 --attention-backend FLASHMLA", RequestError, "--attention-backend FLASHMLA keeps vLLM's own path"),
        ("deepseek-r1 -tp 8 -dcp 8", RequestError, "--decode-context-parallel-size keeps"),
        ("deepseek-r1 --prefill_context_parallel_size=2", RequestError, "--prefill-context-parallel-size keeps"),
        ("deepseek-r1 --hf-overrides {}", RequestError, "--hf-overrides is not read here"),
        ("deepseek-r1 --config a.yaml", RequestError, "--config is not read here"),
        ("deepseek-ai/DeepSeek-V3.2 -tp 8", RequestError, "has sparse attention"),
        ("meta/Llama-4", ModelError, "neither a preset nor a path"),
    ],
)
def test_refusals(text, error, word):
    with pytest.raises(error) as found:
        deployment_requests(text, [GFX942])
    assert word in str(found.value).replace("No closing", "no closing")
    assert "\n" not in str(found.value)


WORDS = st.sampled_from(
    ["deepseek-r1", "-tp", "8", "--dtype", "half", "--kv-cache-dtype", "fp8", "-dcp", "1", "vllm", "serve", "A=1"]
)


@given(st.lists(WORDS | st.text(max_size=5), max_size=8).map(" ".join))
def test_no_command_ends_in_another_error(text):
    with contextlib.suppress(MlagenError):
        assert deployment_requests(text, [GFX950])
