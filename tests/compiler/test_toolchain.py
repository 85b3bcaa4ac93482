"""The compilers: what they make, that it is the same everywhere, and what is said and left behind when they fail."""

import ctypes
import logging
import os
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlagen import toolchain
from mlagen.errors import BuildError, RequestError, TargetError, ToolchainError
from mlagen.toolchain import compile_device, compile_host, compiler_identity, host_compiler

KERNEL = """\
extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(64, 64)))
void add(const float* a, float* out, int n)
{
    const unsigned i = __builtin_amdgcn_workitem_id_x();
    out[i] = a[i] + n;
}
"""
BROKEN = KERNEL.replace("+ n;", "+ n")
UNDEFINED = "__attribute__((device)) float elsewhere(float);\n" + KERNEL.replace("+ n;", "+ elsewhere(n);")
HOST = 'extern "C" int answer() { return 42; }\n'

# e_flags: the machine in the low byte, then "any" for xnack and sramecc.
E_FLAGS = {"gfx942": 0x54C, "gfx950": 0x54F}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder in which the builds of a test happen; no setting of the user reaches it."""
    for variable in ("MLAGEN_TOOLCHAIN", "MLAGEN_HOST_CXX", "ROCM_PATH"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def code_object_header(binary: bytes) -> tuple[bytes, int, int, int]:
    """Magic, e_type, e_machine and e_flags of a 64-bit ELF file."""
    kind, machine, _, _, _, _, flags = struct.unpack_from("<HHIQQQI", binary, 16)
    return binary[:5], kind, machine, flags


def assert_only_source(workplace: Path, name: str, text: str) -> Path:
    """One folder is left in `workplace`, and in it the source alone, whole."""
    (folder,) = workplace.iterdir()
    (kept,) = folder.iterdir()
    assert kept.name == name
    assert kept.read_text() == text
    return kept


def command_in(message: str) -> str:
    (line,) = (line for line in message.splitlines() if line.startswith("command: "))
    return line.removeprefix("command: ")


# zig


@pytest.mark.compiler
@pytest.mark.parametrize("arch", E_FLAGS)
def test_a_kernel_becomes_a_code_object(arch, workplace):
    built = compile_device(KERNEL, arch, name="add")
    assert code_object_header(built.binary) == (b"\x7fELF\x02", 3, 224, E_FLAGS[arch])
    assert f'.amdgcn_target "amdgcn-amd-amdhsa--{arch}"' in built.assembly
    assert ".amdhsa_kernel add" in built.assembly
    assert built.compiler == compiler_identity() == compiler_identity("zig")
    assert built.compiler.startswith("ziglang ")
    assert "(clang " in built.compiler
    assert built.warnings == ""
    assert not list(workplace.iterdir())


@pytest.mark.compiler
@pytest.mark.parametrize("arch", E_FLAGS)
def test_arguments_are_preloaded(arch):
    assembly = compile_device(KERNEL, arch, name="add").assembly
    assert ".amdhsa_user_sgpr_kernarg_preload_length 5" in assembly  # two pointers and an int
    assert ".amdhsa_code_object_version 5" in assembly


@pytest.mark.compiler
def test_the_same_source_gives_the_same_bytes(tmp_path, monkeypatch):
    first = compile_device(KERNEL, "gfx950", name="add")
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    for variable in ("CPATH", "CPLUS_INCLUDE_PATH", "SOURCE_DATE_EPOCH", "HIPCC_COMPILE_FLAGS_APPEND"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("CCC_OVERRIDE_OPTIONS", "x-O3 +-O0")
    assert compile_device(KERNEL, "gfx950", name="add") == first
    assert not list(elsewhere.iterdir())


@pytest.mark.compiler
def test_nothing_of_the_machine_gets_in(tmp_path):
    built = compile_device(KERNEL, "gfx942", name="add")
    for text in (built.assembly, built.compiler, built.command, built.binary.decode("latin-1")):
        assert str(tmp_path) not in text
        assert str(Path(sys.executable).parent) not in text
        assert str(Path.home()) not in text
    assert not re.search(r"__hip_cuid_\w", built.assembly)  # clang's hash of the path and the options


@pytest.mark.compiler
def test_the_command_makes_the_same_binary(tmp_path):
    built = compile_device(KERNEL, "gfx942", name="add")
    (tmp_path / "add.hip").write_text(KERNEL)
    command = built.command.replace("python ", shlex.quote(sys.executable) + " ")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "add.co").read_bytes() == built.binary
    assert (tmp_path / "add.s").read_text() == built.assembly


@pytest.mark.compiler
def test_headers_of_the_machine_are_not_found():
    with pytest.raises(BuildError, match=r"'stdint\.h' file not found"):
        compile_device("#include <stdint.h>\n" + KERNEL, "gfx942", name="add")


@pytest.mark.compiler
def test_it_works_without_a_home(monkeypatch):
    monkeypatch.setenv("HOME", "/proc/nowhere")
    for variable in ("XDG_CACHE_HOME", "ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    assert compile_device(KERNEL, "gfx942", name="add").binary


@pytest.mark.compiler
def test_many_at_once(workplace):
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda arch: compile_device(KERNEL, arch, name="add"), [*E_FLAGS] * 4))
    assert len(set(built)) == 2
    assert not list(workplace.iterdir())


@pytest.mark.compiler
def test_warnings_are_kept():
    built = compile_device(KERNEL.replace("out[i]", "int spare; out[i]"), "gfx942", name="add")
    assert "add.hip:5:" in built.warnings
    assert "unused variable 'spare'" in built.warnings
    assert built.warnings.count("[-Wunused-variable]") == 1


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("amdgpu_flat_work_group_size", "amdgpu_flat_workgroup_size", "unknown attribute"),
        ("a[i] + n", "a[i] + 0.1", "increases floating-point precision"),
        ("{\n", "{\n#pragma unrol\n", "unknown pragma"),
        ("out[i] =", "unsigned char c = 300; out[i] = c +", "changes value from 300 to 44"),
    ],
    ids=["attribute", "double", "pragma", "constant"],
)
def test_some_warnings_are_errors(right, wrong, words):
    with pytest.raises(BuildError, match=words):
        compile_device(KERNEL.replace(right, wrong), "gfx942", name="add")


# A compile that fails


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("source", "words", "steps"),
    [(BROKEN, "add.hip:5:22: error: expected ';' after expression", 1), (UNDEFINED, "symbol: elsewhere(float)", 3)],
    ids=["syntax", "link"],
)
def test_a_failure_says_everything_and_can_be_run_again(source, words, steps, workplace):
    with pytest.raises(BuildError) as raised:
        compile_device(source, "gfx942", name="add")
    message = str(raised.value)
    assert message.startswith(f"add: {compiler_identity('zig')} failed with exit status 1\n")
    assert words in message
    kept = assert_only_source(workplace, "add.hip", source)
    assert f"source: {kept}\n" in message
    command = command_in(message)
    assert command.count("ziglang") == steps
    again = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert again.stderr.strip() in message


@pytest.mark.compiler
def test_the_source_is_kept_where_asked(workplace, tmp_path):
    place = tmp_path / "kept here"
    place.mkdir()
    with pytest.raises(BuildError) as raised:
        compile_device(BROKEN, "gfx942", name="add", keep_dir=place)
    assert str(assert_only_source(place, "add.hip", BROKEN)) in str(raised.value)
    assert not list(workplace.iterdir())
    assert compile_device(KERNEL, "gfx942", name="add", keep_dir=place).binary
    assert len(list(place.iterdir())) == 1


def run_with_limit(limit: int, workplace: Path) -> str:
    """Compile KERNEL where no file may grow beyond `limit` bytes; the name of the error and its message."""
    code = (
        "import resource, sys\n"
        "from mlagen.toolchain import compile_device\n"
        "compile_device('', 'gfx942', name='nothing')\n"  # whatever else is written, Python's caches say, is written by now
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"compile_device({KERNEL!r}, 'gfx942', name='add')\n"
    )
    root = Path(toolchain.__file__).parents[1]
    environment = {**os.environ, "TMPDIR": str(workplace), "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    return done.stderr.partition("\nmlagen.errors.")[2]


@pytest.mark.compiler
def test_a_source_that_cannot_be_written_leaves_nothing(workplace):
    message = run_with_limit(100, workplace)
    assert message.startswith("BuildError: add: cannot build in ")
    assert "File too large" in message
    assert "TMPDIR" in message
    assert not list(workplace.iterdir())


@pytest.mark.compiler
def test_an_output_that_cannot_be_written_leaves_the_source(workplace):
    message = run_with_limit(1000, workplace)
    assert message.startswith("BuildError: add: ziglang ")
    assert "command: " in message
    assert_only_source(workplace, "add.hip", KERNEL)


@pytest.mark.compiler
def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(BuildError, match=r"nowhere.*name another folder"):
        compile_device(KERNEL, "gfx942", name="add", keep_dir=tmp_path / "nowhere")


@pytest.mark.compiler
def test_an_interrupt_leaves_nothing(workplace, monkeypatch):
    communicate = subprocess.Popen.communicate
    calls = []

    def interrupted(process, *args, **kwargs):
        calls.append(process)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return communicate(process, *args, **kwargs)

    compiler_identity("zig")  # asked once per process, and not interrupted here
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_device(KERNEL, "gfx942", name="add")
    assert calls[0].returncode is not None
    assert not list(workplace.iterdir())


# The choice of a toolchain


def test_an_unknown_toolchain(monkeypatch):
    with pytest.raises(RequestError, match="toolchain='gcc' is not a toolchain for AMD GPUs; possible are auto, zig, rocm"):
        compile_device(KERNEL, "gfx942", name="add", toolchain="gcc")
    monkeypatch.setenv("MLAGEN_TOOLCHAIN", "msvc")
    with pytest.raises(RequestError, match="MLAGEN_TOOLCHAIN='msvc' is not a toolchain"):
        compiler_identity()


@pytest.mark.parametrize("arch", ["", "sm_90", "gfx", "gfx942 -v", "gfx942:xnack+", "GFX942"])
def test_an_unusable_arch(arch):
    with pytest.raises(TargetError, match="arch="):
        compile_device(KERNEL, arch, name="add")


@pytest.mark.parametrize("name", ["", "../add", "a/b", "-o", ".hidden", "a b", "a\n"])
def test_an_unusable_name(name):
    with pytest.raises(RequestError, match="name="):
        compile_device(KERNEL, "gfx942", name=name)
    with pytest.raises(RequestError, match="name="):
        compile_host(HOST, name=name)


def test_without_ziglang(monkeypatch):
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(ToolchainError, match="pip install ziglang"):
        compile_device(KERNEL, "gfx942", name="add")
    monkeypatch.setenv("MLAGEN_HOST_CXX", "zig")
    with pytest.raises(ToolchainError, match="pip install ziglang"):
        host_compiler()


def test_without_rocm(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.setenv("MLAGEN_TOOLCHAIN", "rocm")
    with pytest.raises(ToolchainError) as raised:
        compile_device(KERNEL, "gfx942", name="add")
    for word in ("amdclang++", "hipcc", "$ROCM_PATH (not set)", "the PATH", "/opt/rocm/llvm/bin", "pip install ziglang"):
        assert word in str(raised.value)
    monkeypatch.setenv("ROCM_PATH", "/some/rocm")
    with pytest.raises(ToolchainError, match="in /some/rocm/bin, /some/rocm/llvm/bin, the PATH"):
        compiler_identity("rocm")


# ROCm, played by a script in front of zig's clang


def stand_in(path: Path, version: str) -> Path:
    """A ROCm compiler at `path`, which notes its arguments in a file beside it, one call a line."""
    zig = f"{shlex.quote(sys.executable)} -m ziglang"
    script(path.parent / "tools" / "lld", f'shift 2\nexec {zig} ld.lld "$@"\n')  # behind `-flavor gnu`
    return script(
        path,
        f"""case "$*" in --version) printf {shlex.quote(version)}; exit ;; esac
echo "$*" >>"$0.log"
PATH="$(dirname "$0")/tools:$PATH" exec {zig} clang -nogpuinc "$@"
""",
    )


AMDCLANG = "AMD clang version 19.0.0git (roc-6.4.0)\\nTarget: x86_64\\nInstalledDir: /secret/path\\n"
HIPCC = "HIP version: 6.4.43482\\n" + AMDCLANG


@pytest.mark.compiler
@pytest.mark.parametrize("arch", E_FLAGS)
def test_rocm_makes_a_plain_code_object(arch, tmp_path, monkeypatch, workplace):
    compiler = stand_in(tmp_path / "bin" / "amdclang++", AMDCLANG)
    monkeypatch.setenv("PATH", f"{compiler.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MLAGEN_TOOLCHAIN", "rocm")
    monkeypatch.setenv("HIPCC_COMPILE_FLAGS_APPEND", "-O0")
    built = compile_device(KERNEL, arch, name="add")
    assert code_object_header(built.binary) == (b"\x7fELF\x02", 3, 224, E_FLAGS[arch])
    assert built.assembly == compile_device(KERNEL, arch, name="add", toolchain="zig").assembly
    assert built.compiler == "amdclang++ (AMD clang version 19.0.0git (roc-6.4.0))"
    assert built.command.startswith("amdclang++ -x hip ")
    calls = Path(f"{compiler}.log").read_text().splitlines()
    assert built.command == " && ".join(f"amdclang++ {call}" for call in calls)
    assert [call.rpartition("--no-gpu-bundle-output ")[2] for call in calls] == ["-S add.hip -o add.s", "add.hip -o add.co"]
    for call in calls:
        assert "--cuda-device-only -nogpulib -O3 -std=c++17 -ffp-contract=off -fno-math-errno " in call
        assert f"--offload-arch={arch}" in call
        assert "-mllvm --amdgpu-kernarg-preload-count=16" in call
        assert "-nogpuinc" not in call
    assert not list(workplace.iterdir())


@pytest.mark.compiler
def test_rocm_is_found_where_it_is(tmp_path, monkeypatch):
    on_path = stand_in(tmp_path / "path" / "hipcc", HIPCC)
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "rocm"))
    assert compiler_identity("rocm") == "hipcc (HIP version: 6.4.43482; AMD clang version 19.0.0git (roc-6.4.0))"
    stand_in(tmp_path / "rocm" / "llvm" / "bin" / "amdclang++", AMDCLANG)
    assert compiler_identity("rocm").startswith("amdclang++ ")


@pytest.mark.compiler
def test_rocm_fails_as_zig_does(tmp_path, monkeypatch, workplace):
    compiler = stand_in(tmp_path / "a rocm" / "bin" / "hipcc", HIPCC)
    monkeypatch.setenv("ROCM_PATH", str(compiler.parents[1]))
    monkeypatch.setattr(shutil, "which", lambda tool, path=None: str(compiler) if tool == "hipcc" else None)
    with pytest.raises(BuildError) as raised:
        compile_device(BROKEN, "gfx942", name="add", toolchain="rocm")
    assert "expected ';'" in str(raised.value)
    assert_only_source(workplace, "add.hip", BROKEN)
    again = subprocess.run(command_in(str(raised.value)), shell=True, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert again.stderr.strip() in str(raised.value)


def test_a_bundle_is_not_a_code_object(tmp_path, monkeypatch, workplace):
    text = """case "$*" in --version) echo clang version 19; exit ;; esac
while [ $# -gt 1 ]; do shift; done
printf __CLANG_OFFLOAD_BUNDLE__ >"$1"
"""
    compiler = script(tmp_path / "bin" / "amdclang++", text)
    monkeypatch.setenv("ROCM_PATH", str(compiler.parents[1]))
    with pytest.raises(BuildError, match="something other than a linked code object"):
        compile_device(KERNEL, "gfx942", name="add", toolchain="rocm")
    assert not list(workplace.iterdir())


def test_a_compiler_that_does_not_run(tmp_path, monkeypatch):
    compiler = script(tmp_path / "bin" / "amdclang++", "echo no libLLVM >&2; exit 127\n")
    monkeypatch.setenv("ROCM_PATH", str(compiler.parents[1]))
    with pytest.raises(ToolchainError, match=r"does not run: .*no libLLVM"):
        compiler_identity("rocm")


# The host


def load(library: bytes, path: Path) -> ctypes.CDLL:
    path.write_bytes(library)
    return ctypes.CDLL(str(path))


def host_compilers() -> list:
    """Each host compiler that is here, as parameters."""
    found = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
    return [*found, pytest.param("zig", marks=pytest.mark.slow)]


@pytest.fixture(params=host_compilers())
def host_cxx(request, monkeypatch):
    monkeypatch.setenv("MLAGEN_HOST_CXX", request.param)
    return request.param


ARITHMETIC = """\
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
namespace { thread_local int own = 1; }
inline int& counter() { static int count = 0; return count; }
extern "C" int count() { return ++counter(); }
extern "C" int is_char_signed() { return static_cast<char>(0xff) < 0; }
extern "C" std::uint32_t mul_add(float a, float b, float c)
{
    const float sum = a * b + c;
    std::uint32_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    return bits;
}
extern "C" int is_nan(float x) { return x != x && std::isnan(x); }
extern "C" int on_threads(int n)
{
    std::vector<int> each(n);
    std::vector<std::thread> threads;
    for (int i = 0; i < n; ++i) threads.emplace_back([&each, i] { each[i] = own += i; });
    for (auto& thread : threads) thread.join();
    int sum = 0;
    for (int value : each) sum += value;
    return sum;
}
extern "C" int overflow(int x) { return x + 1 < x; }
"""


@pytest.mark.host
def test_a_library_computes_the_same_with_every_compiler(host_cxx, tmp_path, workplace):
    library = load(compile_host(ARITHMETIC, name="arithmetic"), tmp_path / "arithmetic.so")
    assert not list(workplace.iterdir())
    library.mul_add.argtypes, library.mul_add.restype = [ctypes.c_float] * 3, ctypes.c_uint32
    library.is_nan.argtypes = [ctypes.c_float]
    # (1 + 2^-12)^2 - 1: the square rounds to 1 + 2^-11 before the sum; a fused multiply-add would keep its 2^-24.
    x = 1 + 2.0**-12
    assert library.mul_add(x, x, -1.0) == struct.unpack("<I", struct.pack("<f", 2.0**-11))[0]
    assert library.is_nan(float("nan")) == 1
    assert library.is_char_signed() == 1
    assert library.on_threads(4) == 4 + 6
    library.overflow(2**31 - 1)  # whatever it answers, it does not trap


@pytest.mark.host
def test_libraries_share_nothing(host_cxx, tmp_path):
    first = load(compile_host(ARITHMETIC, name="first"), tmp_path / "first.so")
    second = load(compile_host(ARITHMETIC, name="second"), tmp_path / "second.so")
    assert [first.count(), first.count(), second.count()] == [1, 2, 1]


@pytest.mark.host
def test_the_same_host_source_gives_the_same_bytes(host_cxx, tmp_path, monkeypatch):
    first = compile_host(ARITHMETIC, name="arithmetic")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert compile_host(ARITHMETIC, name="arithmetic") == first


@pytest.mark.host
def test_the_host_compiler_tells_its_version(host_cxx):
    identity = host_compiler()
    assert ("clang" in identity) == (host_cxx in ("clang++", "zig"))
    assert identity.endswith(f" for {os.uname().machine}-{sys.platform}")
    assert any(letter.isdigit() for letter in identity.partition(" for ")[0])


@pytest.mark.host
def test_a_host_compile_that_fails(host_cxx, workplace):
    source = HOST.replace("42;", "42 + unheard_of;")
    with pytest.raises(BuildError) as raised:
        compile_host(source, name="answer")
    assert "unheard_of" in str(raised.value)
    kept = assert_only_source(workplace, "answer.cpp", source)
    assert f"source: {kept}\n" in str(raised.value)
    environment = {**os.environ, "LC_ALL": "C"}
    again = subprocess.run(command_in(str(raised.value)), shell=True, capture_output=True, text=True, env=environment)
    assert again.returncode
    assert again.stderr.strip() in str(raised.value)


@pytest.mark.host
def test_host_warnings_are_logged(caplog):
    with caplog.at_level(logging.WARNING, "mlagen"):
        compile_host("static int unused_one() { return 1; }\n" + HOST, name="answer")
    assert "unused_one" in caplog.text
    assert host_compiler() in caplog.text


@pytest.mark.parametrize("wanted", ["no-such-compiler", "no-such-compiler -O2", "'open quote"])
def test_a_host_compiler_that_is_not_there(wanted, monkeypatch):
    monkeypatch.setenv("MLAGEN_HOST_CXX", wanted)
    with pytest.raises(ToolchainError, match=r"MLAGEN_HOST_CXX=.* is not a command"):
        compile_host(HOST, name="answer")


@pytest.mark.host
def test_a_host_compiler_with_arguments(tmp_path, monkeypatch):
    compiler = shutil.which("g++") or shutil.which("clang++") or pytest.skip("compiler")
    monkeypatch.setenv("MLAGEN_HOST_CXX", f"{compiler} -DANSWER=43")
    library = load(compile_host(HOST.replace("42", "ANSWER"), name="answer"), tmp_path / "answer.so")
    assert library.answer() == 43


def test_the_order_of_host_compilers(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for tool in ("c++", "clang++", "g++"):
        compiler = script(tmp_path / tool, f"echo {tool} 1.0\n")
        assert host_compiler().startswith(f"{tool} 1.0 for ")
    assert compiler.name == "g++"


@pytest.mark.compiler
def test_zig_is_the_last_host_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(tmp_path))
    assert host_compiler().startswith(f"{compiler_identity('zig')} for ")


def test_a_compiler_that_hangs_is_stopped_with_its_children(tmp_path, monkeypatch, workplace):
    text = f"""case "$*" in *--version) echo sleepy 1.0; exit ;; esac
sleep 60 & echo $! >{shlex.quote(str(tmp_path / "pid"))}; wait
"""
    monkeypatch.setenv("MLAGEN_HOST_CXX", shlex.quote(str(script(tmp_path / "sleepy", text))))
    monkeypatch.setattr(toolchain, "_TIMEOUT_S", 1)
    with pytest.raises(BuildError, match="did not finish within 1 s"):
        compile_host(HOST, name="answer")
    assert_only_source(workplace, "answer.cpp", HOST)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


# Where zig keeps its libc++


@pytest.fixture
def no_caches(monkeypatch):
    for variable in ("ZIG_GLOBAL_CACHE_DIR", "MLAGEN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")


@pytest.mark.parametrize(
    ("variable", "folder"), [("ZIG_GLOBAL_CACHE_DIR", ""), ("MLAGEN_CACHE_DIR", "zig"), ("XDG_CACHE_HOME", "zig")]
)
def test_zig_caches_where_it_is_told(variable, folder, tmp_path, monkeypatch, no_caches):
    monkeypatch.setenv(variable, str(tmp_path))
    assert toolchain._zig_cache_dir() == tmp_path / folder


def test_zig_caches_elsewhere_if_home_cannot_be_written(workplace, no_caches):
    folder = toolchain._zig_cache_dir()
    assert folder.parent == workplace
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert toolchain._zig_cache_dir() == folder


def test_zig_does_not_cache_in_what_others_put_there(workplace, tmp_path, no_caches):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (workplace / f"mlagen-zig-{os.getuid()}").symlink_to(theirs)
    with pytest.raises(ToolchainError, match="set ZIG_GLOBAL_CACHE_DIR"):
        toolchain._zig_cache_dir()
