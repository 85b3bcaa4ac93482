"""AITER's own test file of fused_qk_rope_concat_and_cache_mla, unchanged, with mlagen's drop-in by the name of aiter.

The file comes from the checkout that AITER_ROOT names and runs as its authors run it; `import aiter` finds the folder standin.  Its
part on concat_and_cache_mla alone, without RoPE, is left out: mlagen has no drop-in for that, and would be compared with nothing.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlagen.runtime import device_arch

pytestmark = pytest.mark.aiter_root

STANDIN = Path(__file__).parent / "standin"
REPOSITORY = Path(__file__).parents[2]
FILE = "op_tests/test_concat_cache_mla.py"

FEW = ("-t", "4", "-hd", "2")
"""The smallest of its cases, for the host run: fp8 and bf16, both styles of RoPE, one KV head and two, some slots padded."""


def run(*options: str, device: str, arch: str, standin: Path = STANDIN) -> subprocess.CompletedProcess[str]:
    """The file as a program of its own, on `device`, in the fp8 of `arch`."""
    path = (str(standin), str(REPOSITORY), os.environ.get("PYTHONPATH"))
    return subprocess.run(
        [sys.executable, os.path.join(os.environ["AITER_ROOT"], FILE), "-c", "fused_qk", "-dev", device, *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "AITER_LOG_LEVEL": "WARNING", "GPU_ARCHS": arch},
        capture_output=True,
        text=True,
        timeout=550,
    )


@pytest.mark.host
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(
    "options",
    [FEW, ("-t", "32", "-blk", "8", "-hd", "2", "-ql", "contiguous", "strided")],
    ids=["slots", "blocks"],
)
def test_on_the_cpu(options, arch):
    done = run(*options, device="cpu", arch=arch)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("-ql", "contiguous", "strided"), ("-blk", "64", "-t", "128", "1024", "-hd", "2", "16")],
    ids=["its own cases", "blocks"],
)
def test_on_the_gpu(options):
    done = run(*options, device="cuda", arch=device_arch(0))
    assert done.returncode == 0, done.stderr


# That it would see a defect


@pytest.mark.host
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a * cos - b * sin", "a * cos + b * sin"),
        ("rows / scale", "rows * scale"),
        ("slot_mapping >= 0", "slot_mapping >= 1"),
        ("as fused_qk_rope_concat_and_cache_mla\n", "as _fused\n\n\ndef fused_qk_rope_concat_and_cache_mla(*_, **__): ...\n"),
    ],
    ids=["RoPE", "scale", "slot 0", "nothing done"],
)
def test_a_difference_fails(old, new, tmp_path):
    shutil.copytree(STANDIN, tmp_path / "standin")
    package = tmp_path / "standin/aiter/__init__.py"
    text = package.read_text()
    assert old in text
    package.write_text(text.replace(old, new))
    done = run(*FEW, device="cpu", arch="gfx950", standin=tmp_path / "standin")
    assert done.returncode == 1
    assert "AssertionError" in done.stderr


@pytest.mark.parametrize(
    ("a", "b"),
    [([8.0, 9.0], [8.0, 11.0]), ([1.0] * 18 + [1.125] * 2, [1.0] * 20), ([float("nan")], [1.0])],
    ids=["no neighbours", "many neighbours", "NaN"],
)
def test_what_the_comparison_refuses(a, b, monkeypatch):
    with pytest.raises(AssertionError):
        comparison()(torch.tensor(a), torch.tensor(b))


def test_what_the_comparison_takes():
    assert comparison()(torch.tensor([1.0] * 19 + [1.125]), torch.tensor([1.0] * 20)) == 0.05


def comparison():
    """checkAllclose of the stand-in."""
    names: dict[str, object] = {}
    exec((STANDIN / "aiter/test_common.py").read_text(), names)
    return names["checkAllclose"]
