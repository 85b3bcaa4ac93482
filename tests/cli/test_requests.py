"""Wrong requests: exit status 2, one line that says what is wrong and what would be right, and nothing compiled or written."""

import json
import os
import shlex
import string
from pathlib import Path

import pytest
from cli.command import line, run
from hypothesis import given
from hypothesis import strategies as st

from mlagen import build, toolchain
from mlagen.errors import BuildError
from mlagen.models import PRESETS

MODELS = Path(__file__).parents[1] / "data" / "models"
DEEPSEEK = json.loads((MODELS / "deepseek-v3.json").read_text())


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty current folder, and compilers that must not be called."""

    def compile_nothing(*args, **kwargs):
        raise BuildError("the request got as far as the compiler")

    monkeypatch.setattr(build, "compile_device", compile_nothing)
    monkeypatch.setattr(toolchain, "compile_host", compile_nothing)
    for variable in ("MLAGEN_TOOLCHAIN", "MLAGEN_CUDA_TOOLCHAIN"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refused(*arguments) -> str:
    """The line that refuses a request; nothing is left in the current folder that was not there."""
    before = sorted(os.walk("."))
    words = line(run(*arguments), 2)
    assert sorted(os.walk(".")) == before
    return words


ALL_ARCHS = "choose one of gfx942 (MI300X, MI300A, MI325X), gfx950 (MI350X, MI355X)"

NOT_AMD = "is not a toolchain for AMD GPUs; possible are auto, zig, rocm"
NOT_NVIDIA = "is not a toolchain for NVIDIA GPUs; possible are auto, nvrtc, nvcc"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("build deepseek-r9", "model 'deepseek-r9' is neither a preset nor a path that exists; did you mean deepseek-r1"),
        ("build ''", "model '' is neither a preset nor a path that exists"),
        ("build deepseek-r1 --tp 0", "tp is 0, but must divide the 128 heads of deepseek-r1: it may be 1, 2, 4, 8,"),
        ("build deepseek-r1 --tp -1", "tp is -1, but must divide"),
        ("build deepseek-r1 --tp 3", "tp is 3, but must divide"),
        ("build glm-4.7-lite --tp 8", "the 20 heads of glm-4.7-lite: it may be 1, 2, 4, 5, 10, 20"),
        ("build deepseek-r1 --tp 99999999999999999999", "but must divide"),
        ("build deepseek-r1 --tp abc", "'--tp'"),
        ("build deepseek-r1 --tp", "'--tp' requires an argument"),
        ("build deepseek-r1 --arch gfx1201", f"arch='gfx1201' is not supported: {ALL_ARCHS}"),
        ("build deepseek-r1 --arch gfx90a", f"arch='gfx90a' is not supported: {ALL_ARCHS}"),
        ("build deepseek-r1 --arch gfx950 --arch sm_80", "arch='sm_80' is not supported"),
        ("build deepseek-r1 --arch ''", "arch='' is not supported"),
        ("build deepseek-r1 --q-dtype int8", "q_dtype='int8': must be one of fp8, bf16"),
        ("build deepseek-r1 --kv-dtype fp16", "kv_dtype='fp16': must be one of fp8, bf16 for a bf16 model"),
        ("build deepseek-r1 --weight fp4", "weight='fp4': must be one of bf16, fp8, fp8-block, mxfp4, none"),
        ("build deepseek-r1 --rounding up", "rounding='up': must be one of fused, stepwise"),
        ("build deepseek-r1 --fp8-max nan", "fp8_max=nan: must be a positive number, up to 448 (OCP) or 240 (FNUZ)"),
        ("build deepseek-r1 --fp8-max -1", "fp8_max=-1.0: must be a positive number"),
        ("build deepseek-r1 --fp8-max inf", "fp8_max=inf: must be a positive number"),
        ("build deepseek-r1 --fp8-max 449", "fp8_max=449.0: must be a positive number"),
        ("build deepseek-r1 --fp8-max 230", "fp8_max=230.0: must be a value that fp8 holds exactly"),
        ("build deepseek-r1 --fp8-max 256 --arch gfx942", "fp8_max=256: gfx942's fp8_e4m3fnuz ends at 240"),
        ("build deepseek-r1 --fp8-max 224 --q-dtype bf16 --kv-dtype bf16", "fp8_max=224.0 without an fp8 output"),
        ("build deepseek-r1 --fp8-max big", "'--fp8-max'"),
        ("build", "name one of: a MODEL, --vllm-args, --all, --generated"),
        ("build deepseek-r1 --all", "name one of"),
        ("build --all --generated", "name one of"),
        ("build --all --tp 4", "--tp goes with a MODEL"),
        ("build --all --arch gfx942", "--arch goes with a MODEL"),
        ("build --generated --q-dtype fp8", "--q-dtype goes with a MODEL"),
        ("build --check --fp8-max 1", "--fp8-max goes with a MODEL"),
        ("build --all --rope-first", "--rope-first goes with a MODEL"),
        ("build --all --compute a8", "--compute goes with a MODEL"),
        ("build deepseek-r1 --compute a8", "compute='a8' with weight='bf16': it multiplies fp8 codes, use weight='fp8'"),
        ("build deepseek-r1 --compute a4", "compute='a4': must be one of a16, a8"),
        ("verify deepseek-r1 --weight int4", "weight='int4': must be one of bf16, fp8, fp8-block, mxfp4, none"),
        (
            "tune --device model --arch gfx942 --weight fp8",
            "--weight fp8: the model of the hardware does weights of the model's dtype",
        ),
        ("tune --device model --arch gfx942 --no-write-kv", "--no-write-kv: the model of the hardware does weights of"),
        ("tune --device model --arch gfx942 --q-dtype bf16", "--q-dtype bf16: the model of the hardware does weights of"),
        ("build --all --kv-layout segmented", "--kv-layout goes with a MODEL"),
        ("build --all --kv-heads 2", "--kv-heads goes with a MODEL"),
        ("build deepseek-r1 --kv-heads 0", "kv_heads=0: must be an integer, from 1 to 4096"),
        ("build deepseek-r1 --kv-heads 2 --kv-layout segmented", "kv_heads=2 with kv_layout='segmented'"),
        ("build deepseek-r1 --kv-layout flat", "kv_layout='flat': must be one of paged, segmented, fp8_ds_mla"),
        ("verify deepseek-r1 --kv-layout fp8_ds_mla --kv-dtype bf16", "kv_layout='fp8_ds_mla' with kv_dtype='bf16'"),
        ("build deepseek-r1 --kv-layout segmented --rope-first", "kv_layout='segmented' with nope_first=False"),
        ("build --all --q-scaling token", "--q-scaling goes with a MODEL"),
        ("verify deepseek-r1 --q-scaling row", "q_scaling='row': must be one of static, token"),
        ("build deepseek-r1 --q-scaling token --q-dtype bf16", "q_scaling='token' with q_dtype='bf16'"),
        ("build --all --q-split", "--q-split goes with a MODEL"),
        ("verify glm5-next --q-split", "q_split=True with rope_dim=0: there is nothing to split"),
        ("build --all --no-write-q", "--no-write-q goes with a MODEL"),
        ("verify deepseek-r1 --no-write-q --no-write-kv", "write_q=False with write_kv=False: nothing would be written"),
        ("build deepseek-r1 glm-5", "unexpected extra argument"),
        ("build deepseek-r1 --out ''", "'--out': it is empty; name a folder"),
        ("build deepseek-r1 --check", "build: no folder of that name; build it first, or name the one to check with --out"),
        ("build --check", "generated: no folder of that name"),
        ("verify deepseek-r9", "did you mean deepseek-r1"),
        ("verify deepseek-r1 --tp 3", "tp is 3, but must divide"),
        ("verify deepseek-r1 --arch gfx1201", ALL_ARCHS),
        ("build deepseek-r1 --arch sm_90 --toolchain zig", f"toolchain='zig' {NOT_NVIDIA}"),
        ("build deepseek-r1 --arch sm_90 --toolchain hiprtc", f"toolchain='hiprtc' {NOT_NVIDIA}"),
        ("build deepseek-r1 --arch gfx950 --arch sm_90 --toolchain rocm", f"toolchain='rocm' {NOT_NVIDIA}"),
        ("build deepseek-r1 --arch sm_90 --arch gfx950 --toolchain nvcc", f"toolchain='nvcc' {NOT_AMD}"),
        ("verify deepseek-r1 --device tpu", "--device tpu: expected host, cuda or hip"),
        ("verify deepseek-r1 --seed -1", "'--seed'"),
        ("verify deepseek-r1 --seed 18446744073709551616", "'--seed'"),
        ("verify deepseek-r1 --tokens 1025", "--tokens 1025: with 128 heads at most 512 fit into memory; raise --tp"),
        ("inspect nowhere", "nowhere: no manifest.json there; name a folder that `mlagen build --out` wrote"),
        ("inspect ''", "it is empty; name a folder"),
    ],
)
def test_a_wrong_request(command, words):
    assert words in refused(*shlex.split(command))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("frobnicate", "No such command 'frobnicate'; see `mlagen --help`"),
        ("--frobnicate", "No such option: --frobnicate; see `mlagen --help`"),
        ("build --frobnicate", "see `mlagen build --help`"),
        ("models deepseek-r1", "see `mlagen models --help`"),
        ("verify", "Missing argument 'model'; see `mlagen verify --help`"),
        ("inspect", "Missing argument 'DIR'; see `mlagen inspect --help`"),
    ],
)
def test_a_wrong_command_points_to_its_help(command, words):
    assert words in refused(*command.split())


def test_no_command_shows_the_help():
    result = run()
    assert result.status == 2
    assert result.err == "mlagen: name a command; see `mlagen --help`\n"
    for command in ("models", "build", "verify", "inspect"):
        assert command in result.out


@pytest.mark.parametrize("tokens", ["", ",", "1,,2", "1,", "a", "-1", "1.5", "1_0", "0x10", "٣", "65537", "9" * 5000])
def test_tokens_that_are_no_numbers(tokens):
    words = refused("verify", "minicpm3", "--tokens", tokens)
    assert "but must be numbers from 0 to 65536 separated by commas, like 1,16,64" in words
    assert len(words) < 200


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_any_word_is_no_model(text):
    known = text.strip().lower() in PRESETS or os.path.exists(text)
    if not known and not text.startswith("-"):
        assert "presets: deepseek-v2, " in line(run("build", text), 2)


# A config.json


def config(**changes) -> str:
    """The text of DeepSeek-V3's config.json with some fields changed."""
    return json.dumps({**DEEPSEEK, **changes})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("{", "is not JSON"),
        ("[1]", "holds [1] where a JSON object belongs"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"kv_lora_rank": 1' + "0" * 5000 + "}", "more digits than Python reads"),
        ('{"model_type": "llama", "num_attention_heads": 32}', "is not an MLA model: it has no kv_lora_rank"),
        (config(kv_lora_rank=None), "is not an MLA model: its kv_lora_rank is null"),
        (config(kv_lora_rank=-512), "kv_lora_rank is -512, but must be an integer from 16"),
        (config(kv_lora_rank=10**9), "kv_lora_rank is 1000000000, but must be"),
        (config(kv_lora_rank=4096), "kv_lora_rank is 4096, but must be an integer from 16 to 2048"),
        (config(qk_nope_head_dim=127), "qk_nope_head_dim is 127, but must be"),
        (config(qk_rope_head_dim="64"), "qk_rope_head_dim is '64', but must be"),
        (config(num_attention_heads=0), "num_attention_heads is 0, but must be"),
        (config(num_attention_heads=True), "num_attention_heads is true, but must be"),
        (config(torch_dtype="float32"), "torch_dtype is 'float32', but must be"),
    ],
    ids=range(16),
)
def test_a_wrong_config(text, words):
    Path("config.json").write_text(text)
    assert words in refused("build", "config.json")
    assert words in refused("verify", ".")


def test_a_config_that_is_not_text():
    Path("config.json").write_bytes(bytes(range(256)))
    assert "config.json is not UTF-8 text (byte 128)" in refused("build", "config.json")


def test_a_folder_without_a_config():
    assert "holds no config.json" in refused("build", ".")


@pytest.mark.parametrize("path", ["/dev/zero", "pipe"])
def test_a_config_that_never_ends(path):
    os.mkfifo("pipe")
    assert f"{path} is not a regular file" in refused("build", path)


def test_a_config_that_cannot_be_read(unprivileged):
    assert line(run("build", unprivileged / "config.json"), 2).endswith("cannot be read: Permission denied; check the path")


# --out


def test_out_is_a_file(workplace):
    Path("taken").write_text("mine")
    assert refused("build", "minicpm3", "--out", "taken") == "--out taken: it is a file, name a folder"
    assert refused("build", "minicpm3", "--out", "taken/x/y") == "--out taken/x/y: taken is a file, name a folder"
    assert Path("taken").read_text() == "mine"


def test_out_leads_nowhere():
    Path("link").symlink_to("nowhere")
    assert refused("build", "minicpm3", "--out", "link/x") == "--out link/x: link leads nowhere; name another folder"


@pytest.mark.parametrize("name", ["x" * 300, "loop/x"])
def test_out_cannot_be_a_path(name):
    Path("loop").symlink_to("loop")
    assert refused("build", "minicpm3", "--out", name).endswith("; name another folder")


@pytest.mark.parametrize("path", ["", "new/folder"])
def test_out_cannot_be_written(path, unprivileged):
    out = unprivileged / path
    assert line(run("build", "minicpm3", "--out", out), 2) == (
        f"--out {out}: no permission to write to {unprivileged}; name another folder"
    )


def test_a_path_in_a_message_stays_in_one_line():
    Path("a\nb").write_text("")
    assert refused("build", "minicpm3", "--out", "a\nb") == "--out a\\nb: it is a file, name a folder"


# A manifest that is there already

ENTRY = {"arch": "gfx942", "spec": {}, "serves": [], "source": {}, "binary": {}, "resources": {}, "instructions": {}}


def manifest(name="kernel", **changes) -> str:
    return json.dumps({"format": 1, "kernels": {name: {**ENTRY, **changes}}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a manifest that mlagen wrote"),
        ("some notes\n", "not a manifest that mlagen wrote"),
        ("[" * 100_000, "not a manifest that mlagen wrote"),
        ("[]", "manifest format None, this version reads 1"),
        ('{"format": 2, "kernels": {}}', "manifest format 2, this version reads 1"),
        ('{"format": 1, "kernels": []}', "this version reads 1"),
        ('{"format": 1, "kernels": {"kernel": {}}}', "its entry 'kernel' is damaged"),
        (manifest(serves=None), "its entry 'kernel' is damaged"),
        (manifest(resources=[]), "its entry 'kernel' is damaged"),
        (manifest(source={"file": "../kernel.hip"}), "its entry 'kernel' is damaged"),
        (manifest(binary={"file": 7}), "its entry 'kernel' is damaged"),
        (manifest(name="[bold]"), "its entry '[bold]' is damaged"),
    ],
    ids=range(12),
)
def test_a_manifest_that_is_not_ours(text, words):
    Path("manifest.json").write_text(text)
    for command in (["build", "minicpm3", "--out", "."], ["inspect", "."], ["inspect", ".", "--json"]):
        refusal = refused(*command)
        assert words in refusal
        assert refusal.endswith("delete it and build again, or name another folder")
    assert Path("manifest.json").read_text() == text


def test_a_manifest_that_is_a_folder():
    Path("manifest.json").mkdir()
    assert "manifest.json: Is a directory" in refused("inspect", ".")


# Toolchains


@pytest.mark.parametrize("name", ["gcc", "nvcc", "", "ZIG"])
def test_an_unknown_toolchain(name):
    words = refused("build", "minicpm3", "--toolchain", name, "--out", "new")
    assert words.startswith(f"toolchain={name!r} {NOT_AMD}")


def test_an_unknown_toolchain_in_the_environment(monkeypatch):
    """Only where it is asked."""
    monkeypatch.setenv("MLAGEN_CUDA_TOOLCHAIN", "clang")
    words = refused("build", "minicpm3", "--arch", "sm_90")
    assert words == f"MLAGEN_CUDA_TOOLCHAIN='clang' {NOT_NVIDIA}"
    for options in (["--arch", "sm_90", "--toolchain", "nvcc"], ["--arch", "gfx950"]):
        assert line(run("build", "minicpm3", *options), 1) == "the request got as far as the compiler"


# Whatever is asked

COMMANDS = st.sampled_from(["models", "build", "verify", "inspect", "x"])
WORDS = st.sampled_from(
    ["minicpm3", "--all", "--check", "--out", "--tp", "--arch", "--tokens", "--q-dtype", "--json", "8", "gfx942", "fp8", "", "--"]
)


@given(COMMANDS, st.lists(WORDS | st.text(string.printable, max_size=5), max_size=6))
def test_no_request_ends_in_a_traceback(command, words):
    result = run(command, *words)
    assert result.status in (0, 1, 2)
    assert result.err.count("\n") == (result.status != 0)


def test_what_vllm_may_ask_for_has_no_options():
    args = ("--vllm-args", "deepseek-r1 -tp 8")
    assert "--kv-dtype does not go with --vllm-args" in refused("build", *args, "--kv-dtype", "bf16")
    assert "--tp does not go with --vllm-args" in refused("build", *args, "--tp", "8")
    for other in ("deepseek-r1", "--all", "--generated"):
        assert "name one of: a MODEL, --vllm-args, --all, --generated" in refused("build", *args, other)
    assert "--vllm-args: no model" in refused("build", "--vllm-args", "")
