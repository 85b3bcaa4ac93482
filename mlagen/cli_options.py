"""What several commands share: options of a kernel, and how a GPU and numbers of tokens are named."""

import re
import reprlib
import sys
from typing import Annotated

import typer
from rich.console import Console

from mlagen.errors import RequestError
from mlagen.shipped import ARCHS

MAX_TOKENS = 65536

Model = Annotated[str, typer.Argument(help="A preset (see `mlagen models`), a config.json, or a folder that holds one.")]
Tp = Annotated[int, typer.Option("--tp", help="Tensor-parallel size: the heads are divided by it.")]
Archs = Annotated[list[str] | None, typer.Option("--arch", help=f"GPU architecture; may be repeated. Default: {', '.join(ARCHS)}.")]
Weight = Annotated[
    str | None, typer.Option(help="W_UK: the model's dtype, fp8, fp8-block, mxfp4, or none: q_nope arrives absorbed.")
]
Compute = Annotated[str, typer.Option(help="a16: q_nope as it is; a8: rounded to fp8, for parity with AITER; needs --weight fp8.")]
QDtype = Annotated[str, typer.Option("--q-dtype", help="fp8, or the model's dtype: bf16, fp16.")]
KvDtype = Annotated[str, typer.Option("--kv-dtype", help="fp8, or the model's dtype: bf16, fp16.")]
Rounding = Annotated[str, typer.Option(help="fused: fp32 up to the end; stepwise: round where separate operators would.")]
Fp8Max = Annotated[float | None, typer.Option("--fp8-max", help="Saturate fp8 below the format's limit (vLLM: 224 on gfx942).")]
RopeFirst = Annotated[
    bool, typer.Option("--rope-first", help="The rotary columns before the latent ones in q_out and in the cache.")
]
QScaling = Annotated[str, typer.Option("--q-scaling", help="static: one scale; token: one for each row, computed and returned.")]
QSplit = Annotated[bool, typer.Option("--q-split", help="The query as two tensors, latent and rotary.")]
NoWriteQ = Annotated[bool, typer.Option("--no-write-q", help="Leave the query out: only the cache is written.")]
NoWriteKv = Annotated[bool, typer.Option("--no-write-kv", help="Leave the cache out: only the query is made.")]
KvHeads = Annotated[int, typer.Option("--kv-heads", help="KV heads of this rank, each with an entry of its own in a slot.")]
KvLayout = Annotated[str, typer.Option("--kv-layout", help="paged; segmented: AITER's pages; fp8_ds_mla: vLLM's, with scales.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def plain_console() -> Console:
    """Standard output; wide enough for every table where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False, emoji=False)


def gpu_arch(device: str | None, archs: list[str] | None = None) -> str:
    """The architecture of torch's current GPU.  Raises RequestError where it is not of the kind, or not the one, that was named."""
    import torch

    from mlagen.runtime import device_arch

    platform = "hip" if torch.version.hip else "cuda"
    asked = f"--device {device}: " if device else ""
    if not torch.cuda.is_available():
        raise RequestError(f"{asked}torch {torch.__version__} sees no GPU; `mlagen doctor` says what is missing")
    if device not in (platform, None):
        raise RequestError(f"{asked}this torch is built for {platform}; use --device {platform}")
    arch = device_arch(torch.cuda.current_device())
    if archs and archs != [arch]:
        raise RequestError(f"--arch {' '.join(archs)}: the GPU is a {arch}; leave --arch out")
    return arch


def parse_tokens(text: str, *, least: int = 0) -> list[int]:
    """Numbers of tokens, each from `least` to MAX_TOKENS.  Raises RequestError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", part) and least <= int(part) <= MAX_TOKENS for part in parts):
        allowed = f"numbers from {least} to {MAX_TOKENS} separated by commas, like 1,16,64"
        raise RequestError(f"--tokens is {reprlib.repr(text)}, but must be {allowed}")
    return [int(part) for part in parts]
