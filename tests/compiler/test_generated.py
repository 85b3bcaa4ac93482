"""generated/: what is checked in is what is generated now, it holds nothing of the machine it was made on, and it compiles."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli.command import ROOT, Result, run

from mlagen.errors import BuildError
from mlagen.toolchain import compile_device, compiler_identity

GENERATED = ROOT / "generated"
SOURCES = sorted(GENERATED.glob("*.hip"))
REMEDY = "is not what would be generated now, see above; the same command without --check rewrites it\n"

each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem.removeprefix("mla_prologue_"))


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of generated/, for a test to change."""
    return Path(shutil.copytree(GENERATED, tmp_path / "copy"))


def check(folder: Path) -> Result:
    return run("build", "--check", "--generated", "--out", folder)


def found_different(folder: Path) -> str:
    """The report on a folder that is not as it should be."""
    result = check(folder)
    assert result.status == 1, result
    assert result.err == f"mlagen: {folder} {REMEDY}"
    return result.out


# --check


def test_generated_is_up_to_date(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run("build", "--check") == Result(0, "generated: every source is what would be generated now\n", "")


def test_a_changed_byte_is_shown(copy):
    path = copy / SOURCES[0].name
    text = path.read_text()
    path.write_text(text.replace("// The kernel.", "// The kernel!", 1))
    assert found_different(copy).splitlines()[:3] == [f"{path}: differs", f"--- {path}", "+++ generated now"]
    (before,) = re.findall(r"^-(// The kernel.*)$", found_different(copy), re.MULTILINE)
    (after,) = re.findall(r"^\+(// The kernel.*)$", found_different(copy), re.MULTILINE)
    assert before == after.replace("kernel.", "kernel!", 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"\n",
        lambda data: data.replace(b"\n", b"\r\n", 1),
        lambda data: data.replace(b"//", b"//\f", 1),
        lambda data: data.replace(b" ", b"\xff", 1),
        lambda data: b"",
    ],
    ids=["no newline at the end", "one more", "carriage return", "form feed", "not text", "empty"],
)
def test_no_byte_escapes(change, copy):
    path = copy / SOURCES[-1].name
    path.write_bytes(change(path.read_bytes()))
    report = found_different(copy).split("\n")
    assert report[0] == f"{path}: differs"
    assert report[3].startswith("@@ ")
    assert [line for line in report[4:] if line.startswith(("-", "+"))]
    assert not [line for line in report if SOURCES[0].name in line]


def test_a_missing_source_is_told(copy):
    (copy / SOURCES[0].name).unlink()
    assert found_different(copy) == f"{copy / SOURCES[0].name}: No such file or directory\n"


def test_a_folder_instead_of_a_source_is_told(copy):
    path = copy / SOURCES[0].name
    path.unlink()
    path.mkdir()
    assert found_different(copy) == f"{path}: Is a directory\n"


@pytest.mark.parametrize("name", ["mla_prologue_of_yesterday.hip", "mla_prologue_of_yesterday.co", "notes"])
def test_a_file_too_many_is_told(name, copy):
    (copy / name).write_text("")
    assert found_different(copy) == f"{copy / name}: nothing asks for it any more; delete it\n"


def edit_manifest(folder: Path, change) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data["kernels"])
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda kernels: kernels.pop(SOURCES[0].stem), f"its entry for {SOURCES[0].stem} is missing or describes another source"),
        (
            lambda kernels: kernels[SOURCES[0].stem]["source"].update(sha256="0" * 64),
            f"its entry for {SOURCES[0].stem} is missing or describes another source",
        ),
        (lambda kernels: kernels.update(older=kernels[SOURCES[0].stem]), "nothing asks for older any more"),
    ],
    ids=["entry missing", "another source", "entry too many"],
)
def test_a_wrong_manifest_is_told(change, words, copy):
    edit_manifest(copy, change)
    assert found_different(copy) == f"{copy}/manifest.json: {words}\n"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("<<<<<<< HEAD\n")], ids=["missing", "conflict"])
def test_sources_are_compared_whatever_the_manifest_is(damage, copy):
    damage(copy / "manifest.json")
    (copy / SOURCES[0].name).unlink()
    first, second = found_different(copy).splitlines()
    assert first == f"{copy / SOURCES[0].name}: No such file or directory"
    assert "manifest.json" in second


# What is in it


@pytest.mark.compiler
def test_a_fresh_build_gives_the_same_bytes(tmp_path):
    """It compiles every source; with the compiler that made the manifest, binaries' sums and resources are the same as well."""
    assert run("build", "--generated", "--out", tmp_path / "new").status == 0
    fresh, there = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".hip", ".json")}
        for folder in (tmp_path / "new", GENERATED)
    )
    if compiler_identity("zig").encode() not in there["manifest.json"]:
        del fresh["manifest.json"], there["manifest.json"]
    assert fresh == there


@pytest.mark.compiler
def test_a_damaged_folder_can_be_built_again(copy):
    (copy / "manifest.json").write_text("<<<<<<< HEAD\n")
    (copy / SOURCES[0].name).write_text("")
    assert run("build", "--generated", "--out", copy).status == 0
    assert check(copy).status == 0


@each_source
def test_a_source_holds_nothing_of_its_maker(source):
    text = source.read_text(encoding="ascii")
    assert re.findall(r"(?<![\w.*/])/(?:home|root|tmp|usr|opt|var|work|mnt|Users)\b", text) == []
    assert re.findall(r"\b(?:19|20)\d\d[-/]\d\d|\b\d\d:\d\d\b|__DATE__|__TIME__|__FILE__", text) == []
    assert text.startswith(f"// {source.stem}\n//\n")
    assert f"void {source.stem}(" in text


@each_source
def test_a_source_is_tidy(source):
    text = source.read_text()
    assert [line for line in text.split("\n") if line != line.rstrip() or "\t" in line or len(line) > 132] == []
    assert text.endswith("}\n")
    assert "\n\n\n" not in text
    assert not re.search(r"\$\{|<%|//%|<#", text)


@pytest.mark.parametrize("path", [GENERATED / "manifest.json", *SOURCES], ids=lambda path: path.stem.removeprefix("mla_prologue_"))
def test_no_word_of_this_machine(path):
    words = {str(Path.home()), str(ROOT), sys.prefix} - {"/"}
    assert [word for word in words if word in path.read_text()] == []


# hipcc compiles a HIP file twice, once for the host, behind a header of its own that has these names already.
HIPCC_HEADER = """\
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __host__ __attribute__((host))
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
"""


@pytest.mark.compiler
@each_source
def test_the_host_pass_accepts_a_source(source, tmp_path):
    (tmp_path / "header.h").write_text(HIPCC_HEADER)
    flags = ["-x", "hip", "--cuda-host-only", "-fsyntax-only", "-nogpuinc", "-nogpulib", "-nostdinc", "-std=c++17"]
    flags += ["-Wall", "-Wextra", "-Werror", "--target=x86_64-unknown-linux-gnu", f"--offload-arch={source.stem[-6:]}"]
    for header in ([], ["-include", str(tmp_path / "header.h")]):
        command = [sys.executable, "-m", "ziglang", "clang", *flags, *header, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.compiler
@each_source
def test_a_source_refuses_the_other_arch(source):
    """The same fp8 bytes mean other values there."""
    other = {"gfx942": "gfx950", "gfx950": "gfx942"}[source.stem.rsplit("_", 1)[1]]
    with pytest.raises(BuildError, match="its fp8 flavour and its matrix instructions are that architecture's own"):
        compile_device(source.read_text(encoding="utf-8"), other, name=source.stem)
