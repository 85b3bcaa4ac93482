"""What each command does when all is well, and what it says when a build or a check fails."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.command import ROOT, Result, line, run

import mlagen
from mlagen import build, verify
from mlagen.models import PRESETS

CONFIG = Path(__file__).parents[1] / "data" / "models" / "deepseek-v3.json"
KERNEL = "mla_prologue_p64_wbf16_l256_r32_neox_bf16_qfp8_kvfp8_fused_gfx950"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with one kernel, which tests leave as it is."""
    out = tmp_path_factory.mktemp("built")
    assert run("build", "minicpm3", "--tp", "8", "--arch", "gfx950", "--out", out).status == 0
    return out


@pytest.fixture
def copy(built, tmp_path) -> Path:
    """The same, for a test's own use."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


def said(result: Result, status: int = 0) -> str:
    assert result.status == status, result
    return result.out


def readme_commands() -> list[str]:
    """The commands under "Use it" in the README, without their comments."""
    section = (ROOT / "README.md").read_text().partition("## Use it")[2].partition("\n## ")[0]
    return [line.partition("#")[0].strip() for line in section.splitlines() if line.startswith("    mlagen ")]


@pytest.mark.compiler
@pytest.mark.host
def test_the_readme_is_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(CONFIG, "config.json")
    commands = [shlex.split(command)[1:] for command in readme_commands()]
    assert [command[0] for command in commands] == ["models", "build", "build", "verify", "inspect"]
    for command in commands:
        result = run(*command)
        assert result.status == 0, (command, result)
    assert len(list(Path("build").glob("*.hip"))) == len(list(Path("build").glob("*.co"))) == 3


def test_the_version():
    assert said(run("--version")) == f"mlagen {mlagen.__version__}\n"


@pytest.mark.parametrize("command", ["models", "build", "verify", "bench", "inspect"])
def test_every_command_has_help(command):
    assert f"mlagen {command} " in said(run(command, "-h")) == said(run(command, "--help"))


# models


def test_models_lists_every_preset():
    lines = said(run("models")).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    assert [line.split()[:7] for line in lines if "glm-5 " in line] == [["glm-5", "64", "192", "512", "64", "gptj", "bf16"]]


def test_models_as_json():
    assert json.loads(said(run("models", "--json"))) == [dataclasses.asdict(shape) for shape in PRESETS.values()]


# build


@pytest.mark.compiler
def test_build_says_what_it_does(tmp_path):
    result = run("build", "minicpm3", "--tp", "8", "--arch", "gfx950", "--out", tmp_path / "new")
    assert result.err == f"built 1/1 {KERNEL}\n"
    header, row, last = said(result).splitlines()
    assert header.split()[:4] == ["kernel", "vgprs", "agprs", "sgprs"]
    assert row.split()[0] == KERNEL
    assert last == f"1 kernel in {tmp_path / 'new'}"


@pytest.mark.compiler
def test_build_goes_to_build(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(run("build", "minicpm3", "--arch", "gfx950")).endswith("1 kernel in build\n")
    assert Path("build", f"{KERNEL}.co").is_file()


@pytest.mark.compiler
@pytest.mark.parametrize("name", ["with space", "[bold]brackets[/bold]", "ünïcode-雪", "-dash"])
def test_build_writes_to_any_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(run("build", "minicpm3", "--arch", "gfx950", f"--out={name}")).endswith(f"1 kernel in {name}\n")
    assert KERNEL in said(run("inspect", "--", name))


@pytest.mark.compiler
def test_a_compile_error_is_told_whole(tmp_path, monkeypatch, capfd):
    variants = build.variants

    def broken(spec, target):
        return [
            dataclasses.replace(kernel, texts=lambda _, whole=kernel.source: whole + "int unfinished(\n")
            for kernel in variants(spec, target)
        ]

    monkeypatch.setattr(build, "variants", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run("build", "minicpm3", "--arch", "gfx950", "--out", tmp_path / "new")
    assert said(result, 1) == ""
    assert result.err.startswith(f"mlagen: {KERNEL}: ziglang ")
    assert re.search(r"\.hip:\d+:\d+: error: expected", result.err)
    source, command = (re.search(rf"^{word}: (.*)$", result.err, re.MULTILINE).group(1) for word in ("source", "command"))
    assert Path(source).read_text().endswith("int unfinished(\n")
    again = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert again.stderr.strip() in result.err
    assert not (tmp_path / "new").exists()
    assert capfd.readouterr() == ("", "")  # the compiler itself says nothing


# build --check


def test_check_of_what_was_built(built):
    result = run("build", "minicpm3", "--arch", "gfx950", "--check", "--out", built)
    assert said(result) == f"{built}: every source is what would be generated now\n"
    assert result.err == ""


def test_check_writes_nothing(copy):
    before = {path: path.read_bytes() for path in copy.iterdir()}
    assert said(run("build", "minicpm3", "--check", "--out", copy), 1).startswith(f"{copy}/{KERNEL[:-3]}942.hip: No such file")
    assert {path: path.read_bytes() for path in copy.iterdir()} == before


# inspect


def test_inspect_shows_what_kernels_cost(built):
    entry = json.loads((built / "manifest.json").read_text())["kernels"][KERNEL]
    costs, instructions = (line for line in said(run("inspect", built)).splitlines() if KERNEL in line)
    resources = entry["resources"]
    assert costs.split()[1:4] == [str(resources[key]) for key in ("vgprs", "agprs", "sgprs")]
    assert costs.split()[-1] == str(resources["waves_per_simd"])
    assert instructions.split()[1] == str(entry["instructions"]["total"])
    assert f"{entry['instructions']['global_loads']['128']} x 128 bit" in instructions
    assert "x v_mfma_f32_16x16x32_bf16" in instructions


def test_inspect_shows_names_as_they_are(copy):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace("v_mfma_f32_16x16x32_bf16", "[/red]:smile:"))
    assert " x [/red]:smile:" in said(run("inspect", copy))


def test_inspect_as_json(built):
    manifest = json.loads((built / "manifest.json").read_text())
    assert json.loads(said(run("inspect", built, "--json"))) == {"kernels": manifest["kernels"], "damaged": []}


@pytest.mark.parametrize(
    ("suffix", "damage", "words"),
    [
        ("co", Path.unlink, "binary {}.co: No such file or directory"),
        ("hip", Path.unlink, "source {}.hip: No such file or directory"),
        ("co", lambda path: path.write_bytes(path.read_bytes()[:-1]), "binary {}.co is not the file that was built"),
        ("hip", lambda path: path.write_text(path.read_text() + "\n"), "source {}.hip is not the file that was built"),
    ],
    ids=["no binary", "no source", "short binary", "edited source"],
)
def test_inspect_tells_damage(suffix, damage, words, copy):
    damage(copy / f"{KERNEL}.{suffix}")
    table, as_json = run("inspect", copy), run("inspect", copy, "--json")
    assert words.format(KERNEL) in said(table, 1)
    assert words.format(KERNEL) in json.loads(said(as_json, 1))["damaged"][0]
    assert table.err == as_json.err == f"mlagen: {copy}: 1 of its files are missing or not what was built; build them again\n"


# verify


def verify_minicpm3(*options: str) -> Result:
    return run("verify", "minicpm3", "--tp", "8", "--arch", "gfx942", *options)


@pytest.mark.host
def test_verify_shows_every_output():
    title, header, *rows, remark = said(verify_minicpm3("--tokens", "0, 3,3")).splitlines()
    assert remark.startswith("max error: in stored values")
    assert title.strip() == "minicpm3, TP 8, gfx942, on the host"
    assert header.split() == ["tokens", "output", "elements", "exact", "max", "error"]
    outputs = [("q_out", "nope"), ("q_out", "pe"), ("kv_cache", "nope"), ("kv_cache", "pe")]
    assert [tuple(row.split()[:3]) for row in rows] == [(count, *output) for count in "033" for output in outputs]
    assert [row.split()[3] for row in rows[4:8]] == ["3840", "480", "768", "96"]  # of 5 heads, 256 + 32 columns
    assert all(row.rstrip().endswith("ok") for row in rows)


@pytest.mark.host
def test_verify_runs_the_kernels_for_dependent_launch(monkeypatch):
    from mlagen import runtime

    loaded, load = [], runtime.load
    monkeypatch.setattr(runtime, "load", lambda *arguments, **options: loaded.append(load(*arguments, **options)) or loaded[-1])
    assert run("verify", "minicpm3", "--tp", "8", "--arch", "sm_90", "--tokens", "1,40", "--pdl").status == 0
    assert all(variant.generated.dependent for variant in loaded[0].variants)


def test_no_dependent_launch_on_amd():
    assert "gfx942" in line(verify_minicpm3("--pdl"), 2)


@pytest.mark.host
def test_verify_covers_every_arch_unless_told():
    result = said(run("verify", "minicpm3", "--tp", "8", "--tokens", "1"))
    assert re.findall(r"TP 8, (\w+),", result) == ["gfx942", "gfx950"]


@pytest.mark.host
def test_the_seed_changes_the_inputs(monkeypatch):
    seeds = []
    make_case = verify.make_case
    monkeypatch.setattr(verify, "make_case", lambda *args, seed, device: seeds.append(seed) or make_case(*args, seed=seed))
    for seed in ("0", "4294967295"):
        assert verify_minicpm3("--tokens", "2", "--seed", seed).status == 0
    assert seeds == [0, 4294967295]


@pytest.mark.host
def test_verify_fails_where_the_kernel_is_wrong(monkeypatch):
    run_case = verify.run_case

    def run_and_spoil(kernel, case):
        run_case(kernel, case)
        case.q_out.tensor.view(dtype=torch.uint8)[0, 0, 0] ^= 0x80

    monkeypatch.setattr(verify, "run_case", run_and_spoil)
    result = verify_minicpm3("--tokens", "5")
    assert said(result, 1).count("FAILED: 1 outside rounding, 0 stray bytes") == 1
    assert result.err == "mlagen: 1 of the comparisons above failed: the oracle does not explain what the kernel wrote\n"


def test_verify_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for module in ("verify", "runtime"):
        monkeypatch.delitem(sys.modules, f"mlagen.{module}", raising=False)
        monkeypatch.delattr(mlagen, module, raising=False)
    result = verify_minicpm3("--tokens", "1")
    assert result == Result(1, "", "mlagen: verify needs torch, which is not installed: pip install 'mlagen[torch]'\n")


def test_verify_without_a_compiler(monkeypatch):
    monkeypatch.setenv("MLAGEN_HOST_CXX", "no-such-compiler")
    result = run("verify", "glm5-next", "--tp", "8", "--arch", "gfx942", "--rounding", "stepwise", "--tokens", "1")
    assert result.status == 1
    assert result.err.startswith("mlagen: MLAGEN_HOST_CXX='no-such-compiler' is not a command")
    assert result.err.count("\n") == 1
