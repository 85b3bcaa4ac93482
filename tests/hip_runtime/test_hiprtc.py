"""hiprtc: hip-python's own calls, into a stand-in for the library that passes each compile on to ziglang's clang."""

import ctypes
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.compiler, pytest.mark.host]

HERE = Path(__file__).resolve().parent

PRELUDE = """
import json
from programs import SPEC, generated
from mlagen import binaries, build, doctor, shipped, toolchain
from mlagen.errors import MlagenError
from mlagen.target import find_target

def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except MlagenError as error:
        return type(error).__name__, str(error)
    return "", "no error"

kernel, target = generated("gfx942"), find_target("gfx942")
"""


@pytest.fixture(scope="module")
def hiprtc(tmp_path_factory):
    """A function that runs Python text in a process that finds the stand-in, and returns what it assigns to `result`."""
    from mlagen import toolchain

    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang")
    folder = tmp_path_factory.mktemp("hiprtc")
    for name in ("lib", "nothing", "kept", "bin"):
        (folder / name).mkdir()
    library = toolchain.compile_host((HERE / "standin/libhiprtc.cpp").read_text(), name="libhiprtc")
    (folder / "lib/libhiprtc.so").write_bytes(library)
    compiler = f"exec {shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'standin/compile_hip.py'))}"
    _script(folder / "bin/compile", f'{compiler} "$@"')
    _script(folder / "bin/bundle", '{ printf __CLANG_OFFLOAD_BUNDLE__; printf "\\0\\0"; } > "$2"')

    def run(code, library="lib", compiler="compile", **variables):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH")))),
            "LD_LIBRARY_PATH": str(folder / library),
            "ROCM_PATH": str(folder / "nothing"),
            "MLAGEN_CACHE_DIR": str(folder / "cache"),
            "MLAGEN_STANDIN_HIPRTC": str(folder / "bin" / compiler),
        }
        for name in ("MLAGEN_BUNDLE_PATH", "MLAGEN_JIT", "MLAGEN_TOOLCHAIN", "ROCM_HOME", "HIPRTC_COMPILE_OPTIONS_APPEND"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, "-c", f"{PRELUDE}{code}\nprint(json.dumps(result))"],
            env={**environment, **variables},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def _script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


COMPILE = """
made = toolchain.compile_device(kernel.source, "{arch}", name=kernel.name, toolchain="hiprtc")
zigs = toolchain.compile_device(kernel.source, "{arch}", name=kernel.name, toolchain="zig")
result = {{
    "same": made.binary == zigs.binary, "elf": made.binary[:4] == b"\\x7fELF", "mach": made.binary[48],
    "assembly": made.assembly, "compiler": made.compiler, "command": made.command, "warnings": made.warnings,
}}
"""


@pytest.mark.parametrize(("arch", "mach"), [("gfx942", 0x4C), ("gfx950", 0x4F)])
@pytest.mark.parametrize("age", [{}, {"MLAGEN_STANDIN_HIPRTC_OLD": "1"}], ids=["new", "old"])
def test_a_kernel_is_compiled(hiprtc, arch, mach, age):
    """The same flags and the same clang: the same code object as zig's, also without the option for the header."""
    result = hiprtc(COMPILE.format(arch=arch).replace("kernel.", f"generated('{arch}')."), **age)
    assert result["same"]
    assert result["elf"]
    assert result["mach"] == mach  # the low byte of e_flags
    assert result["assembly"] == result["warnings"] == ""
    assert result["compiler"].startswith("hiprtc (libhiprtc.so; ")
    assert f"--offload-arch={arch} -nogpuinc -O3 -std=c++17 -ffp-contract=off" in result["command"]


def test_a_failure_is_reported_whole(hiprtc):
    kind, error = hiprtc(
        "source = kernel.source + '\\nint first = missing_one;\\nint second = missing_two;\\n'\n"
        "result = error_of(toolchain.compile_device, source, 'gfx942', name='broken', toolchain='hiprtc', keep_dir='kept')"
    )
    assert kind == "BuildError"
    assert error.startswith("broken: hiprtc (libhiprtc.so; ")
    for words in ("hiprtcCompileProgram failed: HIPRTC_ERROR_COMPILATION", "'missing_one'", "'missing_two'", "2 errors generated"):
        assert words in error
    lines = error.splitlines()
    kept = Path(lines[1].removeprefix("source: "))
    assert kept.parent.parent.name == "kept"
    assert kept.read_text().endswith("int second = missing_two;\n")
    assert lines[2].startswith(f"command: cd {kept.parent} && amdclang++ -x hip")


def test_a_bundle_is_refused(hiprtc):
    kind, error = hiprtc(
        "result = error_of(toolchain.compile_device, kernel.source, 'gfx942', name='bundled', toolchain='hiprtc')",
        compiler="bundle",
    )
    assert kind == "BuildError"
    assert "gave an offload bundle, not a linked code object; use toolchain zig or rocm" in error


def test_a_missing_library_is_named_with_the_remedy(hiprtc):
    try:
        ctypes.CDLL("libhiprtc.so")
    except OSError:
        pass
    else:
        pytest.skip("rocm")  # of the system, which is always found
    kind, error = hiprtc("result = error_of(toolchain.fingerprint, 'hiprtc')", library="nothing")
    assert kind == "ToolchainError"
    for words in ("failed to dlopen", "install ROCm", "LD_LIBRARY_PATH", "pip install ziglang"):
        assert words in error


def test_a_missing_package_is_named_with_the_remedy(hiprtc):
    kind, error = hiprtc("import sys; sys.modules['hip'] = None\nresult = error_of(toolchain.compiler_identity, 'hiprtc')")
    assert kind == "ToolchainError"
    assert "pip install 'mlagen[rocm]'" in error


CACHED = """
from mlagen.cache import DiskCache
key = binaries.device_key(kernel, target)
binary = binaries.device_binary(SPEC, kernel, target, None)
entry, damage = DiskCache().read(key)
result = {"compiler": key.compiler, "same": entry.binary == binary, "damage": damage, "resources": "resources" in entry.meta,
          "digest": key.digest, "meta": entry.meta["compiler"]}
"""


def test_the_variable_selects_it_and_the_cache_keeps_it_apart(hiprtc):
    ours = hiprtc(CACHED, MLAGEN_TOOLCHAIN="hiprtc")
    zigs = hiprtc(CACHED)
    assert ours["compiler"] == ours["meta"]
    assert ours["compiler"].startswith("hiprtc (")
    assert zigs["compiler"].startswith("ziglang ")
    assert ours["digest"] != zigs["digest"]
    for each in (ours, zigs):
        assert each["same"]
        assert not each["damage"]
    assert [ours["resources"], zigs["resources"]] == [False, True]


def test_options_from_the_environment_are_in_the_key(hiprtc):
    code = "result = binaries.device_key(kernel, target).digest"
    plain = hiprtc(code, MLAGEN_TOOLCHAIN="hiprtc")
    assert plain == hiprtc(code, MLAGEN_TOOLCHAIN="hiprtc")
    assert plain != hiprtc(code, MLAGEN_TOOLCHAIN="hiprtc", HIPRTC_COMPILE_OPTIONS_APPEND="-O1")


@pytest.mark.parametrize(("toolchain", "variables"), [("hiprtc", {}), ("auto", {"MLAGEN_TOOLCHAIN": "hiprtc"})])
def test_build_refuses_it(hiprtc, toolchain, variables):
    request = "shipped.request('minicpm3', 8, target)"
    kind, error = hiprtc(f"result = error_of(build.compile_all, [{request}], {toolchain!r}, print)", **variables)
    assert kind == "RequestError"
    assert error.endswith("it is for mlagen.load(); build with zig or rocm")
    assert "\n" not in error


@pytest.mark.parametrize("library", ["lib", "nothing"])
def test_doctor_finds_it_or_says_how_to_get_it(hiprtc, library):
    found = hiprtc("result = [vars(each) for each in doctor._compilers() if each.name == 'hiprtc']", library=library)
    if library == "lib":
        assert [each["works"] for each in found] == [True]
        assert found[0]["detail"].startswith("hiprtc (libhiprtc.so; ")
    elif not found[0]["works"]:  # a system's own is always found
        assert "failed to dlopen" in found[0]["detail"]
        assert "pip install 'mlagen[rocm]', and install ROCm" in found[0]["remedy"]
