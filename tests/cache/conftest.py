"""What the cache's tests share: a cache of their own, a small kernel, a compiler that keeps count, other processes."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlagen import cache
from mlagen.spec import PrologueSpec

ROOT = Path(__file__).resolve().parents[2]

# Keeps count, keeps what it made, and, while a file called "slow" is there, sleeps instead of compiling.
COMPILER = """\
#!/bin/sh
case "$*" in *--version*) exec {real} --version ;; esac
echo $$ >> {folder}/compiles
if [ -e {folder}/slow ]; then echo $$ > {folder}/asleep; exec sleep 600; fi
for output; do :; done
kept={kept}/$(cat ./*.cpp | sha256sum | cut -c 1-64)
if [ ! -e "$kept" ]; then
    {real} "$@" || exit 1
    cp "$output" "$kept.$$" && mv "$kept.$$" "$kept"
else
    cp "$kept" "$output"
fi
"""


@dataclass(frozen=True)
class CountingCompiler:
    folder: Path
    script: Path

    @property
    def compiles(self) -> int:
        log = self.folder / "compiles"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def fall_asleep(self) -> None:
        (self.folder / "slow").touch()

    def wake_up(self) -> None:
        (self.folder / "slow").unlink()

    def sleeper(self) -> int:
        """The process that sleeps instead of compiling, once there is one."""
        wait_for((self.folder / "asleep").exists)
        return int((self.folder / "asleep").read_text())


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not come true within {seconds} s"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def cache_root(tmp_path, monkeypatch) -> Path:
    """The folder of this test's cache, which is not there yet; no setting of the user reaches the test."""
    for name in [name for name in os.environ if name.startswith("MLAGEN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_WARNED", set())
    temporary = tmp_path / "temporary"  # killed and failed compiles leave their folders
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def spec() -> PrologueSpec:
    return PrologueSpec(heads=2, nope_dim=32, lora_rank=64, rope_dim=16, rope_style="gptj")


@pytest.fixture(scope="session")
def kept_libraries(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture
def compiler(tmp_path, monkeypatch, kept_libraries) -> CountingCompiler:
    """The host compiler of this process and its children from now on; what one test compiled, the next gets for nothing."""
    found = next((path for tool in ("g++", "clang++", "c++") if (path := shutil.which(tool))), None)
    if found is None:
        pytest.skip("compiler")
    script = tmp_path / "count-and-compile"
    script.write_text(
        COMPILER.format(real=shlex.quote(found), folder=shlex.quote(str(tmp_path)), kept=shlex.quote(str(kept_libraries)))
    )
    script.chmod(0o700)
    monkeypatch.setenv("MLAGEN_HOST_CXX", str(script))
    return CountingCompiler(tmp_path, script)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start another Python; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen] = []

    def start_(code: str, **variables: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes))
        return started[-1]

    yield start_
    for process in started:
        process.kill()
        with process:  # closes its pipes
            pass


@pytest.fixture
def run(start) -> Callable[..., str]:
    """Run code in another Python to its end; what it printed."""

    def run_(code: str, **variables: str) -> str:
        process = start(code, **variables)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out

    return run_
