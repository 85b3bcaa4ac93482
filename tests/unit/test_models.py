"""Model shapes: every preset's numbers, configs of each family, and whatever can be wrong with a name or a file."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path, PurePath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlagen.errors import ModelError
from mlagen.models import PRESETS, ModelShape, heads_per_rank, read_config, resolve_model

CONFIGS = Path(__file__).parents[1] / "data" / "models"

# heads, L, P, R, RoPE style, v, q_lora
NUMBERS = {
    "deepseek-v2": (128, 512, 128, 64, "gptj", 128, 1536),
    "deepseek-v2-lite": (16, 512, 128, 64, "gptj", 128, None),
    "deepseek-v3": (128, 512, 128, 64, "gptj", 128, 1536),
    "deepseek-r1": (128, 512, 128, 64, "gptj", 128, 1536),
    "deepseek-v3.2": (128, 512, 128, 64, "gptj", 128, 1536),
    "kimi-k2": (64, 512, 128, 64, "gptj", 128, 1536),
    "kimi-linear": (32, 512, 128, 64, "none", 128, None),
    "kimi-k3": (96, 512, 128, 64, "none", 128, 1536),
    "longcat-flash": (64, 512, 128, 64, "gptj", 128, 1536),
    "mistral-large-3": (128, 512, 128, 64, "gptj", 128, 1536),
    "glm-4.7-lite": (20, 512, 192, 64, "gptj", 256, 768),
    "glm-5": (64, 512, 192, 64, "gptj", 256, 2048),
    "glm5-next": (64, 512, 256, 0, "none", 256, 1536),
    "ax-k1": (64, 512, 128, 64, "gptj", 128, 1536),
    "minicpm3": (40, 256, 64, 32, "neox", 64, 768),
}

# The least that a config needs; each test says what it changes.
PLAIN = {
    "model_type": "deepseek_v3",
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
ABSENT = object()
HUGE = 10**5000  # Python refuses to print it


def numbers(shape: ModelShape) -> tuple:
    fields = ("heads", "lora_rank", "nope_dim", "rope_dim", "rope_style", "v_head_dim", "q_lora_rank")
    return tuple(getattr(shape, field) for field in fields)


def changed(config: dict = PLAIN, **changes: object) -> dict:
    return {key: value for key, value in {**config, **changes}.items() if value is not ABSENT}


@pytest.fixture
def write(tmp_path):
    """Writes a config, as JSON unless it is text or bytes already, and gives its path."""

    def write(config: object, name: str = "config.json") -> Path:
        path = tmp_path / name
        text = config if isinstance(config, (str, bytes)) else json.dumps(config)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def brief(value: object) -> str:
    """A test's id: short, and in ASCII."""
    return "huge" if value is HUGE else "absent" if value is ABSENT else ascii(value)[:40]


def one_line(caught: pytest.ExceptionInfo[ModelError]) -> str:
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 1000
    return message


# Presets


def test_the_presets_are_these():
    assert list(PRESETS) == list(NUMBERS)
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["glm-5"]


@pytest.mark.parametrize("name", NUMBERS)
def test_preset(name):
    shape = PRESETS[name]
    assert (shape.name, shape.dtype) == (name, "bf16")
    assert numbers(shape) == NUMBERS[name]
    assert shape.source


@pytest.mark.parametrize("spelling", ["deepseek-r1", "DeepSeek-R1", "DEEPSEEK-R1", " deepseek-r1\n"])
def test_a_preset_is_found_in_any_case(spelling):
    assert resolve_model(spelling) is PRESETS["deepseek-r1"]


def test_a_preset_wins_over_a_file_of_its_name_unless_the_path_says_otherwise(write, tmp_path, monkeypatch):
    write(changed(num_attention_heads=7), "kimi-k2")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("kimi-k2").heads == 64
    assert resolve_model("./kimi-k2").heads == 7
    assert resolve_model(Path("kimi-k2")).heads == 7


@pytest.mark.parametrize(
    ("model", "suggestion"),
    [
        ("deepseek-r2", "deepseek-r1"),
        ("deepseek_v3", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("minicpm-3", "minicpm3"),
        ("GLM-4.7-Flash", "glm-4.7-lite"),
    ],
)
def test_an_unknown_name_is_told_what_comes_close(model, suggestion):
    with pytest.raises(ModelError) as caught:
        resolve_model(model)
    message = one_line(caught)
    assert repr(model) in message
    assert suggestion in re.search(r"did you mean (.*)\?", message)[1]
    assert all(name in message for name in PRESETS)
    assert "config.json" in message


@pytest.mark.parametrize("model", ["", "llama", "/no/such", "a\nb", "a\0b", "x" * 100_000, "\ud800", "日本語"], ids=brief)
def test_a_hopeless_name_is_one_clear_line(model):
    with pytest.raises(ModelError, match="neither a preset nor a path that exists") as caught:
        resolve_model(model)
    assert "presets: deepseek-v2, " in one_line(caught)


@pytest.mark.parametrize("model", [None, 7, b"deepseek-r1", ["deepseek-r1"], HUGE], ids=brief)
def test_a_model_that_is_no_text(model):
    for function in (resolve_model, read_config):
        with pytest.raises(ModelError, match=r"^model is .*, but must be") as caught:
            function(model)
        one_line(caught)


# Configs of each family


@pytest.mark.parametrize(
    ("file", "preset", "name"),
    [
        ("deepseek-v3.json", "deepseek-v3", "deepseek_v3"),
        ("kimi-linear.json", "kimi-linear", "kimi_linear"),
        ("glm-4.7-lite.json", "glm-4.7-lite", "glm4_moe_lite"),
        ("minicpm3.json", "minicpm3", "minicpm3"),
        ("kimi-k2.5.json", "kimi-k2", "kimi_k25"),
        ("mistral-large-3.json", "mistral-large-3", "mla"),
    ],
)
def test_config_of_a_family(file, preset, name):
    shape = read_config(CONFIGS / file)
    assert numbers(shape) == NUMBERS[preset]
    assert (shape.name, shape.dtype) == (name, "bf16")
    assert str(CONFIGS) not in shape.source
    assert resolve_model(str(CONFIGS / file)) == resolve_model(CONFIGS / file) == shape


def test_a_directory_stands_for_its_config(write, tmp_path):
    write(changed(num_attention_heads=8), "params.json")
    assert resolve_model(tmp_path).heads == 8
    write(PLAIN)
    assert resolve_model(str(tmp_path)).heads == 128
    assert read_config(tmp_path).heads == 128


@pytest.mark.parametrize(
    ("changes", "style"),
    [
        ({}, "gptj"),
        ({"rope_interleave": True}, "gptj"),
        ({"rope_interleave": False}, "neox"),
        ({"is_neox_style": False}, "gptj"),
        ({"is_neox_style": True}, "neox"),
        ({"is_neox_style": True, "rope_interleave": False}, "neox"),
        ({"rope_interleave": None, "is_neox_style": None}, "gptj"),
        ({"indexer_rope_interleave": False}, "gptj"),  # the indexer's, not the attention's
        ({"mla_use_nope": True}, "none"),
        ({"mla_use_nope": False}, "gptj"),
        ({"qk_rope_head_dim": 0}, "none"),
        ({"qk_rope_head_dim": 0, "rope_interleave": True}, "none"),
        ({"model_type": "minicpm3"}, "neox"),
        ({"model_type": "minicpm3", "rope_interleave": True}, "gptj"),
        ({"model_type": "kimi_linear"}, "none"),
        ({"model_type": "kimi_linear", "mla_use_nope": False}, "gptj"),
        ({"model_type": "glm_moe_dsa"}, "gptj"),
        ({"model_type": "deepseek_v32"}, "gptj"),
        ({"model_type": "axk1"}, "gptj"),
        ({"model_type": ABSENT, "architectures": ["LongcatFlashForCausalLM"]}, "gptj"),
        ({"model_type": ABSENT, "architectures": "LongcatFlashForCausalLM"}, "gptj"),
        ({"model_type": "my_finetune", "architectures": ["DeepseekV3ForCausalLM"]}, "gptj"),
        ({"model_type": "unheard_of", "rope_interleave": False}, "neox"),
        ({"model_type": "unheard_of", "qk_rope_head_dim": 0}, "none"),
    ],
)
def test_rope_style(write, changes, style):
    assert read_config(write(changed(**changes))).rope_style == style


def test_a_family_of_unknown_style_is_not_guessed(write):
    with pytest.raises(ModelError, match=r"does not say how the model rotates.*\"rope_interleave\": true") as caught:
        read_config(write(changed(model_type="unheard_of")))
    one_line(caught)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "bf16"),
        ({"torch_dtype": None}, "bf16"),
        ({"torch_dtype": "bfloat16"}, "bf16"),
        ({"torch_dtype": "torch.bfloat16"}, "bf16"),
        ({"dtype": "float16"}, "fp16"),
        ({"torch_dtype": "torch.float16"}, "fp16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "fp16"),
    ],
)
def test_dtype(write, changes, dtype):
    assert read_config(write(changed(**changes))).dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "torch.float32", "auto", "", 16, ["bfloat16"], {"text": "bfloat16"}])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_that_no_kernel_has(write, key, dtype):
    with pytest.raises(ModelError, match=rf'config.json: {key} is .*, but must be "bfloat16" or "float16": set it') as caught:
        read_config(write(changed(**{key: dtype})))
    one_line(caught)


@pytest.mark.parametrize("section", ["text_config", "language_config", "llm_config"])
def test_the_language_model_of_a_multimodal_config(write, section):
    config = {"model_type": "kimi_vl", "num_attention_heads": 3, "torch_dtype": "float16", section: changed(kv_lora_rank=256)}
    shape = read_config(write(config))
    assert (shape.name, shape.heads, shape.lora_rank, shape.dtype) == ("kimi_vl", 128, 256, "fp16")
    # The section with a kv_lora_rank counts, the top level before the others.
    assert read_config(write({**config, "kv_lora_rank": None})) == shape
    assert read_config(write(changed(**{section: changed(kv_lora_rank=256)}))).lora_rank == 512
    assert read_config(write(changed(**{section: "broken"}))).lora_rank == 512


def test_an_error_in_a_section_names_it(write):
    with pytest.raises(ModelError, match=r"config.json: text_config.qk_nope_head_dim is missing"):
        read_config(write({"text_config": changed(qk_nope_head_dim=ABSENT)}))
    with pytest.raises(ModelError, match=r"config.json: text_config.dtype is 'float32'"):
        read_config(write({"text_config": changed(dtype="float32")}))
    with pytest.raises(ModelError, match=r"config.json: dtype is 'float32'"):
        read_config(write({"text_config": PLAIN, "dtype": "float32"}))


@pytest.mark.parametrize("head_dim", [0, 64, 72, 128, 192, None, "x"])
def test_head_dim_means_something_else_in_every_model(write, head_dim):
    assert numbers(read_config(write(changed(head_dim=head_dim, qk_head_dim=head_dim)))) == NUMBERS["deepseek-v3"]


def test_a_null_q_lora_rank_may_be_absent_or_zero(write):
    for q_lora_rank in (ABSENT, None, 0):
        assert read_config(write(changed(q_lora_rank=q_lora_rank))).q_lora_rank is None


def test_only_minicpm3_derives_v_head_dim(write):
    absent = {"v_head_dim": ABSENT, "hidden_size": 2560, "num_attention_heads": 40}
    assert read_config(write(changed(model_type="minicpm3", **absent))).v_head_dim == 64
    for changes in ({"model_type": "deepseek_v3"}, {"hidden_size": 2561}, {"hidden_size": 2560.0}, {"hidden_size": ABSENT}):
        with pytest.raises(ModelError, match="v_head_dim is missing"):
            read_config(write(changed(**{"model_type": "minicpm3", **absent, **changes})))


@pytest.mark.parametrize("model_type", ["a/../b", "*/ evil", "日本語", "", "x" * 500, "-", "Ünï"], ids=brief)
def test_the_name_is_fit_for_a_file_and_the_source_for_a_comment(write, model_type):
    shape = read_config(write(changed(model_type=model_type, architectures=["DeepseekV3ForCausalLM"])))
    assert re.fullmatch(r"[a-z0-9][a-z0-9._+-]{0,63}", shape.name)
    assert re.fullmatch(r"[A-Za-z0-9._+ -]+", shape.source)


def test_byte_order_mark_and_duplicate_keys_are_read(write):
    text = json.dumps(PLAIN).removesuffix("}") + ', "num_attention_heads": 32}'  # the last one counts, as everywhere
    assert read_config(write(b"\xef\xbb\xbf" + text.encode())).heads == 32


# Files that are no config of an MLA model


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("not json", r"is not JSON: .* \(line 1, column 1\)"),
        ('{"a": 1,}', "is not JSON"),
        ('{"a": "line\nbreak"}', "is not JSON"),
        ("[]", r"holds \[\] where a JSON object belongs"),
        ("[" * 100_000 + "]" * 100_000, "is nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "is nested too deeply"),
        ("null", "holds null where a JSON object belongs"),
        ("true", "holds true where"),
        ("NaN", "holds nan where"),
        ('"x"', "holds 'x' where"),
        (b"\xff\xfe{\x00}\x00", r"is not UTF-8 text \(byte 0\)"),
        (b'{"a": "\xe9"}', r"is not UTF-8 text \(byte 7\)"),
        ({}, "is not an MLA model: it has no kv_lora_rank"),
        ({"model_type": "llama", "num_attention_heads": 32}, "is not an MLA model: it has no kv_lora_rank"),
        ({"text_config": []}, "is not an MLA model: it has no kv_lora_rank"),
        (changed(kv_lora_rank=None), "is not an MLA model: its kv_lora_rank is null"),
        ({"language_config": changed(kv_lora_rank=None)}, "is not an MLA model: its kv_lora_rank is null"),
        (changed(use_mla=False), "is not an MLA model: use_mla is false"),
    ],
    ids=brief,
)
def test_a_file_that_is_no_config_of_an_mla_model(write, config, complaint):
    with pytest.raises(ModelError, match=rf"config\.json {complaint}") as caught:
        read_config(write(config))
    one_line(caught)


@pytest.mark.parametrize("value", ["512", 512.5, 512.0, True, False, [512], {}, -512, 10**30, float("nan"), float("inf"), "a\nb"])
@pytest.mark.parametrize("key", ["num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"])
def test_a_field_of_the_wrong_type_or_out_of_range(write, key, value):
    with pytest.raises(
        ModelError, match=rf"config\.json: {key} is .*, but must be .* from \d+ to \d+.*; correct the file"
    ) as caught:
        read_config(write(changed(**{key: value})))
    one_line(caught)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("kv_lora_rank", 0, "kv_lora_rank is 0, but must be an integer from 16 to 2048, a multiple of 16 (the matrix cores"),
        ("kv_lora_rank", 500, "kv_lora_rank is 500, but must be an integer from 16 to 2048, a multiple of 16"),
        ("kv_lora_rank", 4112, "kv_lora_rank is 4112, but"),
        ("qk_nope_head_dim", 24, "qk_nope_head_dim is 24, but must be an integer from 16 to 512, a multiple of 16"),
        (
            "qk_rope_head_dim",
            63,
            "qk_rope_head_dim is 63, but must be an integer from 0 to 512, a multiple of 2 (RoPE rotates pairs)",
        ),
        ("qk_rope_head_dim", None, "qk_rope_head_dim is null, but"),
        ("num_attention_heads", 0, "num_attention_heads is 0, but must be an integer from 1 to 4096"),
        ("num_attention_heads", "128", "num_attention_heads is '128', but"),
        ("num_attention_heads", True, "num_attention_heads is true, but"),
        ("v_head_dim", ABSENT, "v_head_dim is missing, but must be an integer"),
        ("q_lora_rank", -1, "q_lora_rank is -1, but"),
        ("q_lora_rank", False, "q_lora_rank is false, but"),
        ("q_lora_rank", 0.0, "q_lora_rank is 0.0, but"),
        ("rope_interleave", "true", "rope_interleave is 'true', but must be true, false or absent"),
        ("mla_use_nope", 1, "mla_use_nope is 1, but must be true, false or absent"),
    ],
)
def test_what_a_complaint_about_a_field_says(write, key, value, complaint):
    with pytest.raises(ModelError, match=re.escape(f"config.json: {complaint}")) as caught:
        read_config(write(changed(**{key: value})))
    one_line(caught)


def test_contradicting_styles(write):
    with pytest.raises(ModelError, match="is_neox_style is true, but must be the opposite of rope_interleave"):
        read_config(write(changed(is_neox_style=True, rope_interleave=True)))


@pytest.mark.skipif(not hasattr(sys, "get_int_max_str_digits"), reason="this Python reads integers of any length")
def test_a_number_of_thousands_of_digits(write):
    with pytest.raises(ModelError, match="more digits than Python reads") as caught:
        read_config(write('{"kv_lora_rank": ' + "9" * 10_000 + "}"))
    one_line(caught)


def test_a_file_that_is_too_big(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.truncate((16 << 20) + 1)  # sparse: costs no disk
    with pytest.raises(ModelError, match="not a regular file of at most 16 MiB") as caught:
        read_config(path)
    one_line(caught)


def test_paths_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, complaint in [
        ("missing.json", "cannot be read: No such file"),
        ("pipe", "not a regular file"),
        ("loop", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("a\0b", "cannot be a path"),
        ("\ud800", "cannot be a path|cannot be read"),
        (".", "holds no config.json"),
    ]:
        with pytest.raises(ModelError, match=complaint) as caught:
            read_config(str(tmp_path / name))
        one_line(caught)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(write):
    path = write(PLAIN)
    path.chmod(0)
    with pytest.raises(ModelError, match="cannot be read: Permission denied"):
        read_config(path)


def test_a_path_with_a_line_break_is_shown_in_one_line(tmp_path):
    path = tmp_path / "a\nb"
    path.write_text("")
    with pytest.raises(ModelError, match=r"a\\nb' is empty") as caught:
        read_config(path)
    one_line(caught)


# Shapes made by hand


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", value) for value in ("", "a b", "../x", "-x", "x" * 65, "x\n", None, 7)),
        *(("heads", value) for value in (0, -1, 4097, True, 16.0, "16", None, HUGE)),
        *(("lora_rank", value) for value in (0, 8, 520, 4112, True, 512.0)),
        *(("nope_dim", value) for value in (0, 24, 4112, -16)),
        *(("rope_dim", value) for value in (-2, 63, 1026, 64.0, False)),
        *(("rope_style", value) for value in ("NeoX", "", None, ["none"], "none\n")),
        *(("v_head_dim", value) for value in (0, 4097)),
        *(("q_lora_rank", value) for value in (0, 65537, True, "1536")),
        *(("dtype", value) for value in ("bfloat16", "fp8", None, "")),
        *(("source", value) for value in ("", "two\nlines", "x" * 201, None)),
    ],
    ids=brief,
)
def test_a_shape_checks_its_fields(field, value):
    with pytest.raises(ModelError, match="name is" if field == "name" else f"model deepseek-v3: {field} is") as caught:
        dataclasses.replace(PRESETS["deepseek-v3"], **{field: value})
    assert "but must be" in one_line(caught)


def test_styles_and_rope_dim():
    shape = PRESETS["deepseek-v3"]
    assert dataclasses.replace(shape, rope_style="none").rope_dim == 64  # NoPE models have R columns and do not rotate them
    assert dataclasses.replace(shape, rope_style="none", rope_dim=0).rope_dim == 0
    with pytest.raises(ModelError, match="rope_style is 'gptj', but must be none where rope_dim is 0"):
        dataclasses.replace(shape, rope_dim=0)


def test_a_shape_is_a_value():
    shape = PRESETS["glm-5"]
    assert shape == dataclasses.replace(shape)
    assert hash(shape) == hash(dataclasses.replace(shape))
    with pytest.raises(dataclasses.FrozenInstanceError):
        shape.heads = 1


# Tensor parallelism


def test_heads_per_rank():
    assert heads_per_rank(PRESETS["deepseek-r1"], 8) == 16
    assert heads_per_rank(PRESETS["kimi-k3"], 8) == 12
    assert heads_per_rank(PRESETS["glm-4.7-lite"], 1) == 20
    assert heads_per_rank(PRESETS["deepseek-r1"], 128) == 1


@pytest.mark.parametrize("tp", [0, -1, 3, 256, True, 8.0, "8", None, HUGE], ids=brief)
def test_heads_per_rank_says_what_is_possible(tp):
    with pytest.raises(ModelError, match=r"^tp is .*, but must divide the 128 heads of deepseek-r1") as caught:
        heads_per_rank(PRESETS["deepseek-r1"], tp)
    assert one_line(caught).endswith("it may be 1, 2, 4, 8, 16, 32, 64, 128")


# Whatever the file holds


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
OPTIONAL = ("architectures", "rope_interleave", "is_neox_style", "mla_use_nope", "dtype", "torch_dtype", "use_mla", "n_heads")
SENSIBLE = st.integers(-16, 5000) | st.sampled_from([ABSENT, 16, 64, True, "bfloat16", "minicpm3", "kimi_linear"])
MUTATIONS = st.dictionaries(st.sampled_from([*PLAIN, *OPTIONAL, "hidden_size"]), JSON | SENSIBLE, max_size=4)
CONFIG = st.one_of(
    JSON,
    MUTATIONS.map(lambda changes: changed(**changes)),
    st.builds(lambda top, text: {**changed({}, **top), "text_config": changed(**text)}, MUTATIONS, MUTATIONS),
)


def shape_or_line(path: PurePath) -> None:
    """A config either gives a shape that its own constructor accepts, or a ModelError of one line."""
    try:
        shape = read_config(path)
    except ModelError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert str(path) in message
        assert len(message) < len(str(path)) + 400, message
    else:
        assert shape == dataclasses.replace(shape)
        assert 1 <= heads_per_rank(shape, shape.heads) <= heads_per_rank(shape, 1) == shape.heads


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("configs") / "config.json"


@settings(max_examples=200)
@given(config=CONFIG)
def test_any_json_gives_a_shape_or_one_line(scratch, config):
    scratch.write_text(json.dumps(config))
    shape_or_line(scratch)


@settings(max_examples=150)
@given(cut=st.integers(0, 400), junk=st.binary(max_size=6))
def test_any_damage_gives_a_shape_or_one_line(scratch, cut, junk):
    text = (CONFIGS / "deepseek-v3.json").read_bytes()
    scratch.write_bytes(text[:cut] + junk + text[cut + len(junk) :])
    shape_or_line(scratch)


@given(model=st.text(max_size=40) | st.sampled_from([*PRESETS]).map(str.upper))
def test_any_name_gives_a_preset_or_one_line(model):
    if model.strip().lower() in PRESETS:
        assert resolve_model(model) in PRESETS.values()
    elif not os.path.exists(model):
        with pytest.raises(ModelError) as caught:
            resolve_model(model)
        one_line(caught)


# The module itself


def test_models_needs_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import mlagen.models; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(new - set(sys.stdlib_module_names) - {'mlagen'}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
