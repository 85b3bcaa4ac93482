"""NVRTC's part of the key: found without loading it, where a kernel may lie; found for certain, where one is put."""

import importlib.machinery
import importlib.util

import pytest

from mlagen import binaries, cuda_toolchain, toolchain
from mlagen.binaries import device_binary
from mlagen.cache import DiskCache
from mlagen.codegen import generate
from mlagen.cuda_toolchain import CudaBinary, fingerprint, likely_fingerprint
from mlagen.errors import RequestError
from mlagen.target import TARGETS

TARGET = TARGETS["sm_90"]


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """NVIDIA's wheels, as far as they are found: write(NAME, BYTES) puts a library into the folder of CUDA 13."""
    found = importlib.util.find_spec

    def find_spec(name):
        if name in ("nvidia", "cuda.bindings.nvrtc"):
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(tmp_path / "nvidia")]
            return spec
        return found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    def write(name="libnvrtc.so.13", data=b"NVRTC", folder="cu13"):
        path = tmp_path / "nvidia" / folder / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        cuda_toolchain._wheels_nvrtc.cache_clear()
        return path

    cuda_toolchain._wheels_nvrtc.cache_clear()
    yield write
    cuda_toolchain._wheels_nvrtc.cache_clear()


def test_the_library_of_the_wheels_tells(wheels):
    wheels()
    identities = [likely_fingerprint()[0]]
    assert identities[0].startswith("NVRTC (libnvrtc.so.13; ")
    wheels(data=b"nvrtc")
    identities.append(likely_fingerprint()[0])
    for data in (b"headers", b"HEADERS"):  # the built-in ones are part of the compiler
        wheels("libnvrtc-builtins.so.13.0", data)
        identities.append(likely_fingerprint()[0])
    assert len(set(identities)) == len(identities)
    wheels("libcublas.so.13")
    assert likely_fingerprint()[0] == identities[-1]


@pytest.mark.parametrize("libraries", [[], [("libnvrtc.so.12", "cuda_nvrtc"), ("libnvrtc.so.13", "cu13")]], ids=["none", "two"])
def test_without_just_one_there_is_no_telling(wheels, libraries):
    for name, folder in libraries:
        wheels(name, folder=folder)
    assert likely_fingerprint() is None


def test_without_cuda_bindings_there_is_no_telling(wheels, monkeypatch):
    wheels()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert likely_fingerprint() is None


@pytest.mark.parametrize("wanted", ["nvrtc", "nvcc", "gcc"])
def test_the_variable_is_heeded(wheels, monkeypatch, wanted):
    wheels()
    monkeypatch.setenv("MLAGEN_CUDA_TOOLCHAIN", wanted)
    if wanted == "gcc":
        with pytest.raises(RequestError, match="MLAGEN_CUDA_TOOLCHAIN='gcc'"):
            likely_fingerprint()
    else:
        assert (likely_fingerprint() is None) == (wanted == "nvcc")


def test_what_is_likely_is_what_is_loaded():
    """With the real wheels, where they are."""
    likely = likely_fingerprint()
    if likely is None or cuda_toolchain._load_nvrtc() is None:
        pytest.skip("nvidia-cuda-nvrtc")
    assert likely == fingerprint()


# What is compiled goes where it is certain to belong


@pytest.fixture
def compiler(monkeypatch):
    """An NVRTC that counts; what it is for certain, and most likely, are its attributes."""

    class Compiler:
        certain = likely = "NVRTC (this one)"
        compiles = asked = 0

        def compile_device(self, source, arch, *, name, toolchain="auto"):
            self.compiles += 1
            return CudaBinary(f"by {self.certain}".encode(), usage="", compiler="NVRTC 13", command="nvcc", warnings="")

        def fingerprint(self, toolchain="auto"):
            self.asked += 1
            return self.certain, ()

        def likely_fingerprint(self):
            return self.likely and (self.likely, ())

    found = Compiler()
    for name in ("compile_device", "fingerprint", "likely_fingerprint"):
        monkeypatch.setattr(cuda_toolchain, name, getattr(found, name))
    return found


@pytest.fixture
def load(spec):
    return lambda: device_binary(spec, generate(spec, TARGET), TARGET, None)


def test_a_warm_load_does_not_ask_for_certainty(compiler, load):
    assert load() == load() == b"by NVRTC (this one)"
    assert (compiler.compiles, compiler.asked) == (1, 1)


@pytest.mark.parametrize("likely", [None, "NVRTC (another)"], ids=["unknown", "wrong"])
def test_a_wrong_guess_misplaces_nothing(compiler, load, likely):
    """Who is right about it afterwards does not get what the other one compiled."""
    compiler.likely = likely
    assert load() == load() == b"by NVRTC (this one)"
    assert compiler.compiles == 1
    compiler.certain = compiler.likely = "NVRTC (another)"
    assert load() == b"by NVRTC (another)"
    assert compiler.compiles == 2
    assert len(list(DiskCache().entries())) == 2


def test_a_guess_serves_without_jit(compiler, load, monkeypatch):
    load()
    monkeypatch.setenv("MLAGEN_JIT", "0")
    monkeypatch.setattr(cuda_toolchain, "fingerprint", pytest.fail)
    assert load() == b"by NVRTC (this one)"


def test_every_key_of_a_device_is_looked_up_in_turn(compiler, spec, monkeypatch):
    generated = generate(spec, TARGET)
    compiler.likely = "NVRTC (another)"
    monkeypatch.setattr(toolchain, "fingerprint", lambda: ("clang 1", ()))
    assert [key.compiler for key in binaries._device_keys(generated, TARGET)] == ["NVRTC (another)", "NVRTC (this one)"]
    assert len(list(binaries._device_keys(generate(spec, TARGETS["gfx950"]), TARGETS["gfx950"]))) == 1
