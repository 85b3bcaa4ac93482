"""mlagen doctor: it finds what is there, says how to get what is not, and never falls over what is broken."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlagen import doctor
from mlagen.layout import Layout
from mlagen.tables import Entry, Range, write_table
from mlagen.target import TARGETS

ROOT = Path(__file__).resolve().parents[2]
HOST_TOOLS = ("g++", "clang++")
PACKAGES = ("torch", "ziglang", "cuda", "cuda.bindings", "hip", "rocm")


@pytest.fixture
def run(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Run doctor in a process in which the packages in `without` are not installed."""

    def run_(*words: str, without: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLAGEN_")}
        environment = {**kept, "PYTHONPATH": str(ROOT), "MLAGEN_CACHE_DIR": str(tmp_path / "cache"), **variables}
        code = f"import sys; sys.modules.update(dict.fromkeys({without!r})); from mlagen.cli import main; main()"
        return subprocess.run([sys.executable, "-c", code, "doctor", *words], env=environment, capture_output=True, text=True)

    return run_


def sections(done: subprocess.CompletedProcess) -> dict[str, dict[str, dict]]:
    """The findings of a report in JSON, by section and name."""
    report = json.loads(done.stdout)
    lists = {name: value for name, value in report.items() if isinstance(value, list) and name != "builders"}
    return {name: {each["name"]: each for each in findings} for name, findings in lists.items()}


@pytest.mark.compiler
def test_here(run):
    """On this machine, whatever it has."""
    done = run("--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = sections(done)
    assert found["compilers"]["ziglang"]["works"]
    assert set(found["compilers"]) == {"ziglang", "ROCm", "hiprtc", "NVRTC", "nvcc", "host C++"}
    assert set(found["drivers"]) == {"HIP", "CUDA"}
    assert found["devices"]["torch"]["works"]
    report = json.loads(done.stdout)
    assert "ziglang" in report["builders"]
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    for findings in found.values():
        for each in findings.values():
            assert each["works"] or each["remedy"], f"{each['name']}: nothing says how to get it"


@pytest.mark.compiler
def test_in_words(run):
    done = run(without=("torch",), MLAGEN_JIT="1")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines()]
    for section in ("compilers", "drivers", "devices", "cache", "bundles", "integrations", "environment", "versions"):
        assert section in lines
    assert re.search(r"ok ziglang +ziglang \d+\.\d+\.\d+ \(clang", done.stdout)
    assert re.search(r"-- torch .*\n +-> pip install 'mlagen\[torch\]'", done.stdout)
    assert re.search(r"ok MLAGEN_JIT +1", done.stdout)
    assert lines[-1].startswith("kernels can be built here: ziglang")


def test_a_machine_that_has_nothing(run, tmp_path):
    nowhere = {"PATH": str(tmp_path), "ROCM_PATH": str(tmp_path), "LD_LIBRARY_PATH": ""}
    done = run("--json", without=PACKAGES, **nowhere)
    if json.loads(done.stdout)["builders"] == ["ROCm"]:
        pytest.skip("ROCm is in /opt/rocm")
    assert (done.returncode, done.stderr) == (1, "")
    found = sections(done)
    for section in ("compilers", "drivers", "devices"):
        for each in found[section].values():
            assert not each["works"]
            assert each["detail"]
            assert each["remedy"]
    assert "pip install ziglang" in found["compilers"]["ziglang"]["remedy"]
    assert found["cache"]["cache"]["works"]
    assert run(without=PACKAGES, **nowhere).stderr == "mlagen: no compiler for a GPU works here: pip install ziglang\n"


@pytest.mark.host
def test_a_host_compiler_alone_builds_no_kernel(run, tmp_path):
    compiler, linker = (next((path for tool in tools if (path := shutil.which(tool))), None) for tools in (HOST_TOOLS, ("ld",)))
    if not compiler or not linker:
        pytest.skip("compiler")
    command = f"{compiler} -B{Path(linker).parent}/"  # otherwise it would look on the PATH
    done = run("--json", without=PACKAGES, PATH=str(tmp_path), ROCM_PATH=str(tmp_path), MLAGEN_HOST_CXX=command)
    assert sections(done)["compilers"]["host C++"]["works"]
    assert done.returncode == bool(not json.loads(done.stdout)["builders"])
    assert "host C++" not in json.loads(done.stdout)["builders"]


def test_broken_things_are_findings(run, tmp_path):
    """A compiler that fails, a variable misspelt or with an impossible value, a bundle that is none."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho it broke; exit 4\n")
    broken.chmod(0o755)
    done = run(
        "--json",
        without=PACKAGES,
        PATH=str(tmp_path),
        MLAGEN_HOST_CXX=str(broken),
        MLAGEN_JIT="maybe",
        MLAGEN_LOCK_TIMEOUT="5",
        MLAGEN_CASHE_DIR="/x",
        MLAGEN_COLOUR="1",
        MLAGEN_TOOLCHAIN="gcc",
        MLAGEN_BUNDLE_PATH=str(tmp_path / "none"),
    )
    assert done.stderr == ""
    found = sections(done)
    assert "it broke" in found["compilers"]["host C++"]["detail"]
    environment = found["environment"]
    assert environment["MLAGEN_LOCK_TIMEOUT"]["works"]
    assert "expected 0 or 1" in environment["MLAGEN_JIT"]["remedy"]
    assert environment["MLAGEN_CASHE_DIR"]["remedy"] == "did you mean MLAGEN_CACHE_DIR?"
    assert "MLAGEN_TOOLCHAIN" in environment["MLAGEN_COLOUR"]["remedy"]
    assert environment["MLAGEN_TOOLCHAIN"]["remedy"] == "possible are auto, zig, rocm, hiprtc"
    assert [name for name, each in environment.items() if each["works"]] == [
        "MLAGEN_BUNDLE_PATH",
        "MLAGEN_CACHE_DIR",
        "MLAGEN_HOST_CXX",
        "MLAGEN_LOCK_TIMEOUT",
    ]
    assert not found["bundles"][str(tmp_path / "none")]["works"]


# The cache


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLAGEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_cache_that_is_not_there_is_not_made(cache):
    finding = doctor._cache()
    assert finding.works
    assert finding.facts["path"] == str(cache)
    assert (finding.facts["exists"], finding.facts["safe"], finding.facts["writable"]) == (False, True, True)
    assert not cache.exists()


def test_a_cache_that_is_there_is_tried(cache):
    cache.mkdir(mode=0o700)
    finding = doctor._cache()
    assert finding.works
    assert (finding.facts["exists"], finding.facts["writable"], finding.facts["locks"]) == (True, True, True)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("kernels", "words"), [(1, "1 kernel, 0.0 MB"), (2, "2 kernels, 0.0 MB")])
def test_a_cache_says_how_many_kernels_it_has(cache, kernels, words):
    for number in range(kernels):
        Path(cache, "v1", f"{number:064}").mkdir(parents=True, mode=0o700)
    assert doctor._cache().detail == f"{cache}: {words}"


def test_an_unsafe_cache_does_not_work(cache):
    cache.mkdir()
    cache.chmod(0o777)
    finding = doctor._cache()
    assert (finding.works, finding.facts["safe"]) == (False, False)
    assert "others can write to it" in finding.detail
    assert finding.remedy


def test_a_cache_in_an_impossible_place_does_not_work(monkeypatch):
    monkeypatch.setenv("MLAGEN_CACHE_DIR", "/dev/null/cache")
    finding = doctor._cache()
    assert not finding.works
    assert (finding.facts["safe"], finding.facts["writable"]) == (True, False)


# Devices


class FakeProperties:
    def __init__(self, arch: str) -> None:
        self.gcnArchName, self.major, self.minor = arch, 0, 0


@pytest.mark.parametrize(("arch", "works"), [("gfx942:sramecc+:xnack-", True), ("gfx1201", False)])
def test_devices_are_named_with_their_arch(monkeypatch, arch, works):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Some GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: FakeProperties(arch))
    _, first, second = doctor._devices()
    assert (first.name, second.name) == ("cuda:0", "cuda:1")
    assert first.works is works
    assert first.detail == f"Some GPU 0, {arch.partition(':')[0]}"
    assert works or all(name in first.remedy for name in TARGETS)


# Variables


def told_of_tables(monkeypatch, *paths: Path | str) -> doctor.Finding:
    monkeypatch.setenv("MLAGEN_TABLES", os.pathsep.join(map(str, paths)))
    (finding,) = (each for each in doctor._environment() if each.name == "MLAGEN_TABLES")
    return finding


def test_tables_are_read(monkeypatch, tmp_path):
    """Each of the list; what is wrong with one names it, and what to do."""
    good, bad, binary = (tmp_path / name for name in ("good.json", "bad.json", "binary.json"))
    good.write_text(write_table("sm_90", "a test", [Entry(128, 512, 16, False, (Range(None, Layout()),))]))
    bad.write_text(good.read_text().replace('"waves": 1', '"waves": 0'))
    binary.write_bytes(b"\xff\xfe")
    for paths in ((good,), ("", good, good)):
        finding = told_of_tables(monkeypatch, *paths)
        assert (finding.works, finding.detail, finding.remedy) == (True, os.environ["MLAGEN_TABLES"], "")
    wrong = {
        bad: "waves=0: must be a whole number",
        binary: "cannot be read",
        tmp_path: "cannot be read (Is a directory)",
        tmp_path / "missing.json": "cannot be read (No such file or directory)",
    }
    for path, words in wrong.items():
        finding = told_of_tables(monkeypatch, good, path)
        assert not finding.works
        assert finding.remedy.removeprefix("MLAGEN_TABLES: ").startswith(f"{path}")
        assert words in finding.remedy
        assert "`mlagen tune`" in finding.remedy


def test_every_variable_that_the_package_reads_is_known():
    """And every one that is known is read; the documentation of both is doctor.VARIABLES."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "mlagen").rglob("*.py") if path.stem != "doctor")
    assert set(re.findall(r'environ(?:\.get\(|\[)"(MLAGEN_\w+)"', text)) == set(doctor.VARIABLES)
