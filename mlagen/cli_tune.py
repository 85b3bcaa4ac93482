"""`mlagen tune`: times the layouts on this GPU, or asks the model, and writes a table that build and load use."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlagen.cli_files import file_name, refuse_unwritable, write_whole
from mlagen.cli_options import SpecOptions, Tp, changed, gpu_arch, parse_tokens, with_spec_options
from mlagen.errors import MlagenError, RequestError
from mlagen.model import CLOCK, SOURCE, modelled_table
from mlagen.models import resolve_model
from mlagen.shipped import request
from mlagen.tables import Entry, read_table, table_source, why_untuned, write_table
from mlagen.target import Target, find_target

if TYPE_CHECKING:
    from mlagen.spec import PrologueSpec

MODELLED = tuple(CLOCK)


@with_spec_options
def tune(
    model: Annotated[
        str | None, typer.Argument(help="A preset, a config.json, or a folder that holds one. Not needed with --device model.")
    ] = None,
    tp: Tp = 1,
    *,
    options: SpecOptions,
    device: Annotated[str | None, typer.Option(help="cuda or hip: time on this GPU; model: the shipped tables for AMD.")] = None,
    arch: Annotated[str | None, typer.Option(help=f"With --device model: {' or '.join(MODELLED)}.")] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,8,16,32,64,128,256",
    layers: Annotated[int, typer.Option(min=1, help="Launches in a graph; more are taken where W_UK would stay in a cache.")] = 61,
    repeats: Annotated[int, typer.Option(min=1, help="Replays of each graph, of which the median counts.")] = 9,
    out: Annotated[Path | None, typer.Option(parser=file_name, metavar="FILE", help="Table to write, or to add to.")] = None,
) -> None:
    """Find the fastest layouts for a model's shape and write a table; MLAGEN_TABLES=FILE makes build and load use it."""
    counts = sorted(set(parse_tokens(tokens, least=1)))
    if out is not None:
        refuse_unwritable("--out", out)
    if device == "model":
        if model is not None:
            raise RequestError(f"MODEL is {model}: the model of the hardware does all shipped shapes at once; leave it out")
        for spelled in changed(options).values():
            usual = "weights of the model's dtype, with an fp8 query and cache"
            raise RequestError(f"{spelled}: the model of the hardware does {usual}; leave it out")
        _write_modelled(arch, out)
        return
    if arch is not None:
        raise RequestError(f"--arch {arch}: the GPU says what it is; --arch goes with --device model")
    if device not in ("cuda", "hip", None):
        raise RequestError(f"--device {device}: expected cuda, hip or model")
    if model is None:
        raise RequestError("MODEL: name a preset (see `mlagen models`), a config.json, or a folder that holds one")
    resolve_model(model)  # before the GPU is asked for anything
    target = find_target(gpu_arch(device))
    wanted = request(model, tp, target, **options)
    if reason := why_untuned(wanted.spec):
        raise RequestError(f"{reason}: there is nothing to tune")
    source = _source(options)
    kept = _kept(out, target, source)
    with contextlib.redirect_stdout(sys.stderr):
        found = _measure(wanted.spec, target, counts, layers, repeats)
    from mlagen.tune import merge

    _write(write_table(target.arch, source, merge(kept, found)), out)


def _source(options: SpecOptions) -> str:
    """What a table that is measured here says of itself; each entry of it says itself what weights it is for."""
    import torch

    name = torch.cuda.get_device_name(torch.cuda.current_device())
    kernels = " ".join(spelled for field, spelled in changed(options).items() if field != "weight") or "fp8 query and cache"
    return f"measured by `mlagen tune` on one {name}, {kernels}: us per layer, and of the streaming floor"


def _measure(spec: "PrologueSpec", target: Target, counts: list[int], layers: int, repeats: int) -> list[Entry]:
    """The entries of a shape, telling on standard error how far it is."""
    try:
        import torch
    except ModuleNotFoundError:
        raise MlagenError("tune needs torch, which is not installed: pip install 'mlagen[torch]'") from None
    from mlagen import tune as tuning

    device = torch.device("cuda", torch.cuda.current_device())
    entries: list[Entry] = []
    for dependent in (False, True) if target.dependent_launch else (False,):
        timings = []
        m_tiles = [each.m_tiles for each in entries] or None  # both kinds of launch read the same packed weights
        for timing in tuning.time_candidates(
            spec, target, device, counts, dependent=dependent, m_tiles=m_tiles, layers=layers, repeats=repeats
        ):
            timings.append(timing)
            best = min(timing.us, key=timing.us.__getitem__)
            count = f"{timing.tokens} token{'' if timing.tokens == 1 else 's'}"
            what = f"{'dependent launch, ' if dependent else ''}{count}: {timing.us[best]:.2f} us per layer"
            print(f"{what}, stream {timing.stream:.2f}; best of {len(timing.us)}: {tuning.name_of(best)}")
        entries.append(tuning.entry_of(spec, target, timings, dependent=dependent))
    return entries


def _kept(out: Path | None, target: Target, source: str) -> tuple[Entry, ...]:
    """What is in the table that is to be added to.  Raises RequestError where it is none, or comes from elsewhere."""
    if out is None or not out.exists():
        return ()
    try:
        text = out.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--out {out}: it cannot be read ({error}); name another file") from None
    arch, entries = read_table(text, f"--out {out}")
    if arch != target.arch:
        raise RequestError(f"--out {out}: it is a table for {arch}, and this is for {target.arch}; name another file")
    if table_source(text) != source:
        raise RequestError(f"--out {out}: it is {table_source(text)!r}, and this is {source!r}; name another file")
    return entries


def _write_modelled(arch: str | None, out: Path | None) -> None:
    if arch not in MODELLED:
        asked = f"--arch {arch}" if arch else "--arch is missing"
        raise RequestError(f"{asked}: the model knows {' and '.join(MODELLED)}; name one of them")
    _kept(out, find_target(arch), SOURCE)
    _write(modelled_table(find_target(arch)), out)


def _write(text: str, out: Path | None) -> None:
    """To standard output where no file is named.  Raises MlagenError."""
    if out is None:
        print(text, end="")
    else:
        write_whole("--out", out, text.encode())
