"""The command line.  Exit status: 0 done, 1 a build or a check failed, 2 the request itself is wrong."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from mlagen import __version__
from mlagen.errors import MlagenError, RequestError
from mlagen.models import PRESETS
from mlagen.shipped import Request, representative, request, shipped_matrix
from mlagen.target import TARGETS, find_target

GENERATED = Path("generated")
MAX_VERIFY_TOKENS = 65536

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compile the MLA decode prologue of a model into one fused GPU kernel.",
)

Model = Annotated[str, typer.Argument(help="A preset (see `mlagen models`), a config.json, or a folder that holds one.")]
Tp = Annotated[int, typer.Option("--tp", help="Tensor-parallel size: the heads are divided by it.")]
Archs = Annotated[list[str] | None, typer.Option("--arch", help="A GPU architecture; may be repeated. Default: every one.")]
Weight = Annotated[str | None, typer.Option(help="Type of W_UK: the model's (default), or none: q_nope arrives absorbed.")]
QDtype = Annotated[str, typer.Option("--q-dtype", help="fp8, or the model's dtype: bf16, fp16.")]
KvDtype = Annotated[str, typer.Option("--kv-dtype", help="fp8, or the model's dtype: bf16, fp16.")]
Rounding = Annotated[str, typer.Option(help="fused: fp32 up to the end; stepwise: round where separate operators would.")]
Fp8Max = Annotated[float | None, typer.Option("--fp8-max", help="Saturate fp8 below the format's limit (vLLM: 224 on gfx942).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _requests(model: str, tp: int, archs: list[str] | None, **options: Any) -> list[Request]:
    targets = [find_target(arch) for arch in dict.fromkeys(archs or TARGETS)]
    return [request(model, tp, target, **options) for target in targets]


def _console() -> Console:
    """Standard output; wide enough for every table where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the models that are known by name."""
    if as_json:
        print(json.dumps([dataclasses.asdict(shape) for shape in PRESETS.values()], indent=1))
        return
    table = Table(box=None, header_style="bold")
    for column in ("model", "heads", "P", "L", "R", "RoPE", "dtype", "source"):
        table.add_column(column, justify="right" if column in ("heads", "P", "L", "R") else "left", no_wrap=column == "model")
    for name, shape in PRESETS.items():
        numbers = map(str, (shape.heads, shape.nope_dim, shape.lora_rank, shape.rope_dim))
        table.add_row(name, *numbers, shape.rope_style, shape.dtype, escape(shape.source))
    _console().print(table)


@app.command()
def build(
    model: Annotated[str | None, typer.Argument(help="A preset, a config.json, or a folder that holds one.")] = None,
    tp: Tp = 1,
    arch: Archs = None,
    weight: Weight = None,
    q_dtype: QDtype = "fp8",
    kv_dtype: KvDtype = "fp8",
    rounding: Rounding = "fused",
    fp8_max: Fp8Max = None,
    out: Annotated[Path | None, typer.Option(help="Folder for NAME.hip, NAME.co and manifest.json. Default: build/")] = None,
    toolchain: Annotated[str, typer.Option(help="auto, zig or rocm.")] = "auto",
    build_all: Annotated[bool, typer.Option("--all", help="Every preset, TP size, arch and dtype that the project ships.")] = False,
    generated: Annotated[bool, typer.Option("--generated", help="The sources that are checked in under generated/.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; say what differs from what is there.")] = False,
) -> None:
    """Build kernels: HIP source, code object and manifest."""
    from mlagen import build as builder

    generated = generated or (check and model is None and not build_all)
    if (model is not None) + build_all + generated != 1:
        raise RequestError("name one of: a MODEL, --all, --generated")
    folder = out or (GENERATED if generated else Path("build"))
    if generated or build_all:
        requests = representative() if generated else shipped_matrix()
    else:
        assert model is not None, "exactly one of the three was named"
        options = {"weight": weight, "q_dtype": q_dtype, "kv_dtype": kv_dtype, "rounding": rounding, "fp8_max": fp8_max}
        requests = _requests(model, tp, arch, **options)
    if check:
        report = builder.check(requests, folder, exclusive=generated)
        print("\n".join(report) if report else f"{folder}: every source is what would be generated now")
        raise typer.Exit(1 if report else 0)
    with _Progress() as progress:
        built = builder.build(requests, folder, toolchain=toolchain, sources_only=generated, progress=progress)
    _console().print(_resource_table([kernel.entry for kernel in built], [kernel.generated.name for kernel in built]))
    print(f"{len(built)} kernel{'s' if len(built) != 1 else ''} in {folder}")


class _Progress:
    """A progress bar on a terminal, plain lines elsewhere; both on standard error."""

    def __enter__(self) -> "_Progress":
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            columns = (TextColumn("building"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        return self

    def __call__(self, name: str, done: int, total: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, description=name)
        else:
            print(f"built {done}/{total} {name}", file=sys.stderr)

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()


@app.command()
def verify(
    model: Model,
    tp: Tp = 1,
    arch: Archs = None,
    weight: Weight = None,
    q_dtype: QDtype = "fp8",
    kv_dtype: KvDtype = "fp8",
    rounding: Rounding = "fused",
    fp8_max: Fp8Max = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,16,64",
    device: Annotated[str, typer.Option(help="host: run the kernel on the CPU, lane by lane.")] = "host",
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
) -> None:
    """Run a model's kernels on random inputs and compare every byte with the oracle."""
    counts = _parse_tokens(tokens)
    if device != "host":
        raise RequestError(f"--device {device}: only host is there yet")
    options = {"weight": weight, "q_dtype": q_dtype, "kv_dtype": kv_dtype, "rounding": rounding, "fp8_max": fp8_max}
    requests = _requests(model, tp, arch, **options)
    try:
        from mlagen import verify as checker
        from mlagen.runtime import load
    except ModuleNotFoundError as error:
        raise MlagenError(f"verify needs {error.name}, which is not installed: pip install 'mlagen[torch]'") from None
    console, failed = _console(), False
    for each in requests:
        table = Table(
            box=None,
            header_style="bold",
            title=f"{each.model}, TP {each.tp}, {each.target.arch}, on the host",
            title_justify="left",
        )
        for column in ("tokens", "output", "elements", "exact", "max error", ""):
            table.add_column(column, justify="left" if column in ("output", "") else "right")
        for count, comparisons in checker.verify(load(each.spec, "cpu", arch=each.target.arch), counts, seed=seed):
            for part in comparisons:
                failed |= not part.passed
                verdict = "ok" if part.passed else f"FAILED: {part.outside} outside rounding, {part.stray} stray bytes"
                exact = f"{100 * part.exact_share:.3f} %"
                table.add_row(str(count), part.name, str(part.elements), exact, f"{part.max_error:.3g}", verdict)
        console.print(table)
    raise typer.Exit(1 if failed else 0)


def _parse_tokens(text: str) -> list[int]:
    counts = []
    for part in text.split(","):
        if not part.strip().isascii() or not part.strip().isdigit() or int(part) > MAX_VERIFY_TOKENS:
            raise RequestError(f"--tokens {text}: expected numbers from 0 to {MAX_VERIFY_TOKENS} separated by commas, like 1,16,64")
        counts.append(int(part))
    return counts


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that `mlagen build` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Show what built kernels cost: registers, LDS, scratch, spills, waves, matrix and memory instructions."""
    from mlagen.manifest import damaged_files, read_manifest

    kernels = read_manifest(folder)
    damage = damaged_files(folder, kernels)
    if as_json:
        print(json.dumps({"kernels": kernels, "damaged": damage}, indent=1, sort_keys=True))
    else:
        console = _console()
        console.print(_resource_table(list(kernels.values()), list(kernels)))
        console.print(_instruction_table(list(kernels.values()), list(kernels)))
    for line in damage:
        print(f"mlagen: {line}", file=sys.stderr)
    raise typer.Exit(1 if damage else 0)


RESOURCE_COLUMNS = ("vgprs", "agprs", "sgprs", "lds_bytes", "scratch_bytes", "vgpr_spills", "sgpr_spills", "waves_per_simd")


def _resource_table(entries: list[dict[str, Any]], names: list[str]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("kernel", overflow="fold")
    for column in RESOURCE_COLUMNS:
        table.add_column(column.replace("_", " "), justify="right")
    for name, entry in zip(names, entries, strict=True):
        table.add_row(name, *(str(entry.get("resources", {}).get(column, "?")) for column in RESOURCE_COLUMNS))
    return table


def _instruction_table(entries: list[dict[str, Any]], names: list[str]) -> Table:
    """Static counts; widths in bits."""
    table = Table(box=None, header_style="bold")
    table.add_column("kernel", overflow="fold")
    for column in ("instructions", "MFMA", "global loads", "global stores", "scalar loads", "LDS", "barriers"):
        table.add_column(column, justify="left" if column.startswith(("MFMA", "global")) else "right")
    for name, entry in zip(names, entries, strict=True):
        mix = entry.get("instructions", {})
        table.add_row(
            name, str(mix.get("total", "?")), _tally(mix.get("mfma"), ""), _tally(mix.get("global_loads"), " bit"),
            _tally(mix.get("global_stores"), " bit"), *(str(mix.get(key, "?")) for key in ("scalar_loads", "lds", "barriers")),
        )  # fmt: skip
    return table


def _tally(counts: Any, unit: str) -> str:
    if not isinstance(counts, dict):
        return "?"
    return ", ".join(f"{count} x {key}{unit}" for key, count in counts.items()) or "none"


def _version(value: bool) -> None:
    if value:
        print(f"mlagen {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of mlagen itself."""


def main() -> None:
    """Entry point: one line on standard error for every error that mlagen or the command line raises on purpose."""
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        status = 130
    except typer.TyperException as error:
        print(f"mlagen: {error.format_message()}", file=sys.stderr)
        status = error.exit_code
    except MlagenError as error:
        print(f"mlagen: {error}", file=sys.stderr)
        status = error.exit_status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
