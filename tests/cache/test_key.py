"""The key of the cache: whatever moves a binary moves it, and nothing else does."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from mlagen import binaries, cuda_toolchain, toolchain
from mlagen.binaries import device_key, host_key
from mlagen.cache import Key
from mlagen.codegen import generate
from mlagen.target import TARGETS

KEY = Key("device", "gfx942", "0" * 64, "compiler 1.0", ("-O3", "-x", "hip"), 1, "0.1.0")
OTHER = {
    "kind": "host",
    "arch": "gfx950",
    "source_sha256": "0" * 63 + "1",
    "compiler": "compiler 1.0.1",
    "flags": ("-O3", "-x hip"),
    "abi": 2,
    "mlagen": "0.1.1",
}


@pytest.mark.parametrize("field", [field.name for field in fields(Key)])
def test_each_field_moves_the_digest(field):
    assert replace(KEY, **{field: OTHER[field]}).digest != KEY.digest


def test_no_two_perturbed_keys_share_a_digest():
    keys = [KEY, *(replace(KEY, **{field: value}) for field, value in OTHER.items()), replace(KEY, flags=("-x", "hip", "-O3"))]
    assert len({key.digest for key in keys}) == len(keys)


def test_the_digest_survives_json():
    """meta.json holds the key; its digest is the name of the entry's folder."""
    from mlagen.cache import _digest

    assert _digest(json.loads(json.dumps(asdict(KEY)))) == KEY.digest


# The inputs of a load


@pytest.fixture
def fake_compilers(monkeypatch):
    """No compiler is asked who it is."""
    monkeypatch.setattr(toolchain, "fingerprint", lambda: ("clang 1", ("-O3",)))
    monkeypatch.setattr(toolchain, "host_fingerprint", lambda: ("g++ 1", ("-O2",)))
    monkeypatch.setattr(cuda_toolchain, "fingerprint", lambda: ("NVRTC 1", ("-O3",)))


def digests(spec, arch="gfx950", generated=None):
    generated = generated or generate(spec, TARGETS[arch])
    return device_key(generated, TARGETS[arch]).digest, host_key(generated).digest


def assert_moved(before, after):
    assert all(one != other for one, other in zip(before, after, strict=True))


@pytest.mark.usefixtures("fake_compilers")
class TestInputs:
    @pytest.mark.parametrize(
        "change",
        [
            {"nope_dim": 48},
            {"lora_rank": 80},
            {"rope_dim": 32},
            {"rope_style": "neox"},
            {"dtype": "fp16", "weight": "fp16"},
            {"weight": "none"},
            {"q_dtype": "bf16"},
            {"kv_dtype": "bf16"},
            {"rounding": "stepwise"},
            {"fp8_max": 224.0},
            {"nope_first": False},
            {"kv_heads": 2},
            {"kv_layout": "segmented"},
            {"lora_rank": 128, "kv_layout": "fp8_ds_mla"},
            {"q_scaling": "token"},
            {"q_split": True},
            {"write_q": False},
            {"write_kv": False},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_each_field_of_the_spec_but_the_heads(self, spec, change):
        assert_moved(digests(spec), digests(replace(spec, **change)))

    def test_the_heads_do_not(self, spec):
        assert digests(spec) == digests(replace(spec, heads=128))

    def test_the_arch(self, spec):
        three = [digests(spec, arch) for arch in TARGETS]
        assert len({digest for pair in three for digest in pair}) == 2 * len(TARGETS)

    def test_one_character_of_the_source(self, spec):
        generated = generate(spec, TARGETS["gfx950"])
        changed = replace(generated, texts=lambda build: generated.texts(build) + " ")
        assert_moved(digests(spec, generated=generated), digests(spec, generated=changed))

    @pytest.mark.parametrize("fingerprint", [("other", ("-O3",)), ("clang 1", ("-O3", "-g"))], ids=["identity", "flags"])
    def test_the_compiler(self, spec, monkeypatch, fingerprint):
        before = digests(spec)
        monkeypatch.setattr(toolchain, "fingerprint", lambda: fingerprint)
        monkeypatch.setattr(toolchain, "host_fingerprint", lambda: fingerprint)
        assert_moved(before, digests(spec))

    def test_the_compiler_for_nvidia(self, spec, monkeypatch):
        before, _ = digests(spec, "sm_90")
        monkeypatch.setattr(cuda_toolchain, "fingerprint", lambda: ("nvcc 1", ("-O3",)))
        assert digests(spec, "sm_90")[0] != before

    def test_the_likely_compiler_for_nvidia(self, spec, monkeypatch):
        """What is looked up before the compiler is loaded depends on it in the same way."""
        monkeypatch.setattr(cuda_toolchain, "likely_fingerprint", lambda: likely)
        generated, target, digests_ = generate(spec, TARGETS["sm_90"]), TARGETS["sm_90"], []
        for likely in (("NVRTC 1", ("-O3",)), ("NVRTC 2", ("-O3",)), ("NVRTC 1", ("-O3", "-g"))):
            first, last = binaries._device_keys(generated, target)
            assert last == device_key(generated, target)
            assert (first == last) == (likely == cuda_toolchain.fingerprint())
            digests_.append(first.digest)
        assert len(set(digests_)) == 3

    def test_the_abi(self, spec, monkeypatch):
        before = digests(spec)
        monkeypatch.setattr(binaries, "ABI_VERSION", binaries.ABI_VERSION + 1)
        assert_moved(before, digests(spec))


@pytest.mark.compiler
@pytest.mark.host
def test_what_must_not_matter_does_not(run, tmp_path):
    """Another folder, home, hash seed, locale, order of the environment, and settings of the cache: the same key."""
    code = """
import os, sys
items = list(os.environ.items())
if "REVERSED" in os.environ:
    os.environ.clear()
    os.environ.update(reversed(items))
os.chdir(sys.argv[1] if len(sys.argv) > 1 else os.environ["PLACE"])
from mlagen.binaries import device_key, host_key
from mlagen.codegen import generate
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS
spec = PrologueSpec(heads=2, nope_dim=32, lora_rank=64, rope_dim=16, rope_style="gptj")
generated = generate(spec, TARGETS["gfx950"])
print(device_key(generated, TARGETS["gfx950"]).digest, host_key(generated).digest)
"""
    other = tmp_path / "other"
    other.mkdir()
    moved = dict.fromkeys(("PLACE", "HOME", "TMPDIR", "XDG_CACHE_HOME", "MLAGEN_CACHE_DIR"), str(other))
    settings = {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "REVERSED": "1", "MLAGEN_LOCK_TIMEOUT": "3", "LC_ALL": "C.UTF-8"}
    first = run(code, PLACE=str(tmp_path), PYTHONHASHSEED="1")
    assert first == run(code, **moved, **settings)
    assert len(first.split()) == 2


@pytest.mark.host
def test_options_of_the_host_compiler_move_the_key(spec, compiler, monkeypatch):
    generated = generate(spec, TARGETS["gfx950"])
    before = host_key(generated)
    monkeypatch.setenv("MLAGEN_HOST_CXX", f"{compiler.script} -O0")
    assert host_key(generated) != before


def test_every_module_that_makes_keys_is_covered():
    """A kernel's Key is made in one place, and that of compiled templates in another, which test_templates.py perturbs."""
    package = Path(binaries.__file__).parent
    makers = {path.name for path in package.rglob("*.py") if " Key(" in path.read_text(encoding="utf-8")}
    assert makers == {"binaries.py", "template_cache.py"}
