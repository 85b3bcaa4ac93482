"""mlagen.load through the cache: many processes at once, killed ones, damaged entries; the results are checked each time."""

import os
import shutil
import signal
import warnings

import pytest

from mlagen.cache import BINARY, META, CacheWarning, DiskCache
from mlagen.errors import BuildError, MissingKernelError

pytestmark = pytest.mark.host

SPEC = 'mlagen.PrologueSpec(heads=2, nope_dim=32, lora_rank=64, rope_dim=16, rope_style="gptj")'

LOAD = f"""
import mlagen, warnings
from mlagen.cache import CacheWarning
from mlagen.verify import require
warnings.simplefilter("error", CacheWarning)
require(mlagen.load({SPEC}, "cpu", arch="gfx950"), [3])
print("right")
"""

# The processes part before anything is generated, and start together when the pipe ends.
TOGETHER = f"""
import os, sys, traceback, warnings
import mlagen.verify
from mlagen.cache import CacheWarning
wait, go = os.pipe()
children = []
for _ in range(16):
    child = os.fork()
    if child:
        children.append(child)
        continue
    try:
        warnings.simplefilter("error", CacheWarning)
        os.close(go)
        os.read(wait, 1)
        mlagen.verify.require(mlagen.load({SPEC}, "cpu", arch="gfx950"), [3])
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
os.close(go)
statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(any(statuses))
"""

TIMED = f"""
import time
import mlagen.runtime
spec = {SPEC}
started, busy = time.perf_counter(), time.process_time()
mlagen.load(spec, "cpu", arch="gfx950")
print(time.perf_counter() - started, time.process_time() - busy)
"""


@pytest.fixture
def load(spec, monkeypatch):
    """Load as a new process would, nothing loaded yet, and check what the kernel computes."""
    from mlagen import runtime
    from mlagen.verify import require

    def load_() -> None:
        monkeypatch.setattr(runtime, "_KERNELS", {})
        require(runtime.load(spec, "cpu", arch="gfx950"), [3])

    return load_


def only_entry():
    (folder,) = DiskCache().entries()
    return folder


def test_sixteen_processes_compile_once_and_are_right(compiler, run):
    run(TOGETHER, OMP_NUM_THREADS="1")
    assert compiler.compiles == 1
    assert sorted(path.suffix for path in DiskCache().entries_folder.iterdir()) == ["", ".lock"]


def test_a_process_killed_while_it_compiles_is_no_obstacle(compiler, start, run):
    compiler.fall_asleep()
    process = start(LOAD)
    sleeper = compiler.sleeper()
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    try:
        compiler.wake_up()
        assert run(LOAD, MLAGEN_LOCK_TIMEOUT="600") == "right\n"  # and did not wait for a lock that nobody holds
    finally:
        os.kill(sleeper, signal.SIGKILL)
    assert compiler.compiles == 2
    assert [path.suffix for path in sorted(DiskCache().entries_folder.iterdir())] == ["", ".lock"]


def test_a_compiler_that_hangs_elsewhere_is_waited_for_no_longer_than_allowed(compiler, start, load, monkeypatch):
    compiler.fall_asleep()
    start(LOAD)
    sleeper = compiler.sleeper()
    compiler.wake_up()
    monkeypatch.setenv("MLAGEN_LOCK_TIMEOUT", "0.3")
    try:
        with pytest.warns(CacheWarning, match="waited 0.3 s"):
            load()
    finally:
        os.kill(sleeper, signal.SIGKILL)
    assert compiler.compiles == 2


def test_a_warm_load_starts_no_compile_and_is_quick(compiler, load, run):
    load()
    assert compiler.compiles == 1
    seconds, busy_seconds = map(float, run(TIMED).split())
    print(f"warm load in a new process, after the imports: {1000 * seconds:.0f} ms, busy for {1000 * busy_seconds:.0f} ms")
    assert compiler.compiles == 1
    assert busy_seconds < 1


def of_another_arch(folder, spec):
    from mlagen import runtime

    runtime.load(spec, "cpu", arch="gfx942")
    (other,) = (path for path in DiskCache().entries() if path != folder)
    shutil.rmtree(folder)
    os.rename(other, folder)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder, _: os.truncate(folder / BINARY, (folder / BINARY).stat().st_size // 2), "sha256"),
        (lambda folder, _: flip(folder / BINARY), "sha256"),
        (of_another_arch, "another kernel, for gfx942"),
        (lambda folder, _: (folder / META).unlink(), "No such file"),
        (lambda folder, _: (folder / META).write_bytes(b"\0\xffgarbage"), "garbage"),
        (lambda folder, _: [(folder / name).unlink() for name in (META, BINARY)], "No such file"),
    ],
    ids=["truncated", "bit flipped", "another arch", "meta missing", "meta garbage", "half there"],
)
def test_a_damaged_entry_is_rebuilt(compiler, load, spec, damage, reason):
    load()
    damage(only_entry(), spec)
    before = compiler.compiles
    with pytest.warns(CacheWarning, match=reason) as caught:
        load()
    assert len(caught) == 1
    assert compiler.compiles == before + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load()
    assert compiler.compiles == before + 1


def test_an_entry_says_what_it_is(compiler, load, spec):
    load()
    entry, _ = DiskCache().read(_host_key(spec))
    assert entry.meta["kernel"] == "mla_prologue_p32_wbf16_l64_r16_gptj_bf16_qfp8_kvfp8_fused_gfx950"
    assert type(spec)(**entry.meta["spec"]) == spec
    assert entry.meta["compiler"]
    assert entry.meta["arch"] == "gfx950"


def test_a_compile_that_fails_fails_alike_for_all(compiler, load, monkeypatch):
    compiler.script.write_text('#!/bin/sh\ncase "$*" in *--version*) echo broken 1.0;; *) echo no such luck; exit 3;; esac\n')
    for _ in range(2):
        with pytest.raises(BuildError, match="no such luck"):
            load()


def test_without_jit_the_cache_serves_and_nothing_compiles(compiler, load, monkeypatch):
    monkeypatch.setenv("MLAGEN_JIT", "0")
    with pytest.raises(MissingKernelError, match=r"for the CPU.*not in the cache.*`MLAGEN_JIT=1 mlagen verify MODEL --arch gfx950"):
        load()
    monkeypatch.setenv("MLAGEN_JIT", "1")
    load()
    monkeypatch.setenv("MLAGEN_JIT", "0")
    load()
    (only_entry() / META).unlink()
    with pytest.raises(MissingKernelError, match=r"damaged: meta.json: No such file"):
        load()
    assert compiler.compiles == 1


def _host_key(spec):
    from mlagen.binaries import host_key
    from mlagen.codegen import generate
    from mlagen.target import TARGETS

    return host_key(generate(spec, TARGETS["gfx950"]))
