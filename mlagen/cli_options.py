"""What several commands share: options of a kernel, and how a GPU and numbers of tokens are named."""

import functools
import inspect
import re
import reprlib
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console

from mlagen.errors import RequestError
from mlagen.shipped import ARCHS
from mlagen.spec import PrologueSpec

MAX_TOKENS = 65536

Model = Annotated[str, typer.Argument(help="A preset (see `mlagen models`), a config.json, or a folder that holds one.")]
Tp = Annotated[int, typer.Option("--tp", help="Tensor-parallel size: the heads are divided by it.")]
Archs = Annotated[list[str] | None, typer.Option("--arch", help=f"GPU architecture; may be repeated. Default: {', '.join(ARCHS)}.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

SpecOptions = Mapping[str, Any]
"""Keywords of PrologueSpec.from_model, one for each of SPEC_OPTIONS."""


@dataclass(frozen=True)
class SpecOption:
    """An option for a field of PrologueSpec, of the field's type and with its default.

    `unset` is the option's name where it is a flag that makes a field False which is True by default.
    """

    field: str
    help: str
    unset: str = ""

    @property
    def name(self) -> str:
        """That of a command's parameter."""
        return self.unset or self.field

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def parameter(self) -> inspect.Parameter:
        """What typer makes the option of."""
        kind: Any = typing.get_type_hints(PrologueSpec)[self.field]
        annotation = Annotated[kind, typer.Option(self.flag, help=self.help)]
        default = False if self.unset else getattr(PrologueSpec, self.field)
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


SPEC_OPTIONS = (
    SpecOption("weight", "W_UK: the model's dtype, fp8, fp8-block, mxfp4, or none: q_nope arrives absorbed."),
    SpecOption("q_dtype", "fp8, or the model's dtype: bf16, fp16."),
    SpecOption("kv_dtype", "fp8, or the model's dtype: bf16, fp16."),
    SpecOption("rounding", "fused: fp32 up to the end; stepwise: round where separate operators would."),
    SpecOption("fp8_max", "Saturate fp8 below the format's limit (vLLM: 224 on gfx942)."),
    SpecOption("nope_first", "The rotary columns before the latent ones in q_out and in the cache.", unset="rope_first"),
    SpecOption("compute", "a16: q_nope as it is; a8: rounded to fp8, for parity with AITER; needs --weight fp8."),
    SpecOption("q_scaling", "static: one scale; token: one for each row, computed and returned."),
    SpecOption("q_split", "The query as two tensors, latent and rotary."),
    SpecOption("write_q", "Leave the query out: only the cache is written.", unset="no_write_q"),
    SpecOption("write_kv", "Leave the cache out: only the query is made.", unset="no_write_kv"),
    SpecOption("kv_heads", "KV heads of this rank, each with an entry of its own in a slot."),
    SpecOption("kv_layout", "paged; segmented: AITER's pages; fp8_ds_mla: vLLM's, with scales."),
)
"""The options that say which kernel of a model is meant, in the order of a command's help."""

SPEC_FLAGS = {each.name: each.flag for each in SPEC_OPTIONS}
"""How they are written, by the names of their parameters."""


def with_spec_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with SPEC_OPTIONS in the place of its keyword `options`, which gets what they say as SpecOptions."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = {each.field: not given.pop(each.name) if each.unset else given.pop(each.name) for each in SPEC_OPTIONS}
        command(**given, options=options)

    def parameters(each: inspect.Parameter) -> list[inspect.Parameter]:
        return [option.parameter() for option in SPEC_OPTIONS] if each.name == "options" else [each]

    signature = inspect.signature(command)
    every = [one for each in signature.parameters.values() for one in parameters(each)]
    vars(run)["__signature__"] = signature.replace(parameters=every)  # which typer reads
    return run


def changed(options: SpecOptions) -> dict[str, str]:
    """The fields that have not their default, each with how its option is spelled, such as `--kv-dtype bf16`."""
    given = [(each, options[each.field]) for each in SPEC_OPTIONS if options[each.field] != getattr(PrologueSpec, each.field)]
    return {each.field: each.flag if isinstance(value, bool) else f"{each.flag} {value}" for each, value in given}


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
