"""The command line.  Exit status: 0 done, 1 a build or a check failed, 2 the request itself is wrong."""

import contextlib
import dataclasses
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from mlagen import __version__, cli_bench, cli_graph, cli_tools, cli_tune
from mlagen.cli_options import (
    SPEC_FLAGS,
    Archs,
    AsJson,
    Model,
    SpecOptions,
    Tp,
    gpu_arch,
    parse_tokens,
    plain_console,
    with_spec_options,
)
from mlagen.errors import BuildError, MlagenError, RequestError, VerificationError
from mlagen.integrations.vllm.deployment import deployment_requests
from mlagen.models import PRESETS
from mlagen.shipped import ARCHS, Request, representative, request, shipped_matrix
from mlagen.target import Target, find_target

GENERATED = Path("generated")
INTERRUPTED = 130
MAX_VERIFY_ROWS = 1 << 16
"""Tokens times heads; the oracle takes about 70 KB for each."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compile the MLA decode prologue of a model into one fused GPU kernel.",
)

_python_text = warnings.formatwarning

OUT_HELP = "Folder for NAME.hip, NAME.co or, for NVIDIA, NAME.cubin, and manifest.json. Default: build/"

VLLM_HELP = "The kernels that `vllm serve ARGS` may ask for; in quotes, without MODEL, see docs/vllm.md."


def _folder(text: str) -> Path:
    if not text:  # an unset variable of a script, not the current folder
        raise typer.BadParameter("it is empty; name a folder")
    return Path(text)


def _requests(model: str, tp: int, archs: list[str] | None, **options: Any) -> list[Request]:
    return [request(model, tp, target, **options) for target in _targets(archs)]


def _targets(archs: list[str] | None) -> list[Target]:
    return [find_target(arch) for arch in dict.fromkeys(archs or ARCHS)]


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
        table.add_row(name, *numbers, shape.rope_style, shape.dtype, shape.source)
    plain_console().print(table)


@app.command()
@with_spec_options
def build(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A preset, a config.json, or a folder that holds one.")] = None,
    tp: Tp = 1,
    arch: Archs = None,
    *,
    options: SpecOptions,
    out: Annotated[Path | None, typer.Option(parser=_folder, metavar="DIR", help=OUT_HELP)] = None,
    toolchain: Annotated[str, typer.Option(help="auto; for AMD zig or rocm; for NVIDIA nvrtc or nvcc.")] = "auto",
    vllm_args: Annotated[str | None, typer.Option(metavar="ARGS", help=VLLM_HELP)] = None,
    build_all: Annotated[bool, typer.Option("--all", help="Every preset, TP size, arch and dtype that the project ships.")] = False,
    generated: Annotated[bool, typer.Option("--generated", help="The sources that are checked in under generated/.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; say what differs from what is there.")] = False,
) -> None:
    """Build kernels: HIP source, code object or cubin, and manifest."""
    from mlagen import build as builder

    generated = generated or (check and model is None and vllm_args is None and not build_all)
    if (model is not None) + (vllm_args is not None) + build_all + generated != 1:
        raise RequestError("name one of: a MODEL, --vllm-args, --all, --generated")
    folder = out or (GENERATED if generated else Path("build"))
    if vllm_args is not None:
        for name, flag in {"tp": "--tp", **SPEC_FLAGS}.items():
            if _given(context, name):
                raise RequestError(f"{flag} does not go with --vllm-args, which says what vLLM asks for; leave one of them out")
        requests = deployment_requests(vllm_args, _targets(arch))
    elif model is not None:
        requests = _requests(model, tp, arch, **options)
    else:
        for name, flag in {"tp": "--tp", "arch": "--arch", **SPEC_FLAGS}.items():
            if _given(context, name):
                raise RequestError(f"{flag} goes with a MODEL; leave it out, for what is built without one is fixed")
        requests = representative() if generated else shipped_matrix()
    if check:
        report = builder.check(requests, folder, exclusive=generated)
        if report:
            print("\n".join(report))
            raise BuildError(
                f"{folder} is not what would be generated now, see above; the same command without --check rewrites it"
            )
        print(f"{folder}: every source is what would be generated now")
        return
    with _progress() as progress:
        built = builder.build(requests, folder, toolchain=toolchain, sources_only=generated, progress=progress)
    _print_kernels({kernel.generated.name: kernel.entry for kernel in built}, _resource_cells)
    print(f"{len(built)} kernel{'s' if len(built) != 1 else ''} in {folder}")


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal, plain lines elsewhere; both on standard error."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        yield lambda name, done, total: print(f"built {done}/{total} {name}", file=sys.stderr)
        return
    name_column = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    columns = (TextColumn("building"), BarColumn(bar_width=20), MofNCompleteColumn(), name_column)
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, done, total: bar.update(task, completed=done, total=total, description=name)


@app.command()
@with_spec_options
def verify(
    model: Model,
    tp: Tp = 1,
    arch: Archs = None,
    *,
    options: SpecOptions,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,16,64",
    device: Annotated[str, typer.Option(help="host: on the CPU, lane by lane; cuda, hip: on the GPU that torch sees.")] = "host",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random inputs.")] = 0,
    pdl: Annotated[bool, typer.Option("--pdl", help="The kernels for dependent launch: NVIDIA only.")] = False,
) -> None:
    """Run a model's kernels on random inputs and compare every byte with the oracle."""
    counts = parse_tokens(tokens)
    if device not in ("host", "cuda", "hip"):
        raise RequestError(f"--device {device}: expected host, cuda or hip")
    try:
        from mlagen import verify as checker
        from mlagen.runtime import load
    except ModuleNotFoundError as error:
        raise MlagenError(f"verify needs {error.name}, which is not installed: pip install 'mlagen[torch]'") from None
    requests = _requests(model, tp, arch if device == "host" else [gpu_arch(device, arch)], **options)
    without = [each.target.arch for each in requests if not each.target.dependent_launch]
    if pdl and without:
        raise RequestError(
            f"--pdl: {', '.join(without)} start no kernel before the one before it has ended; leave it out, or --arch sm_90"
        )
    heads = requests[0].spec.heads
    if max(counts) * heads > MAX_VERIFY_ROWS:
        raise RequestError(
            f"--tokens {tokens}: with {heads} heads at most {MAX_VERIFY_ROWS // heads} fit into memory; raise --tp or ask for fewer"
        )
    console, failed = plain_console(), 0
    waiting = Console(stderr=True, highlight=False, markup=False, emoji=False)
    for each in requests:
        table = Table(
            box=None,
            header_style="bold",
            title=f"{each.model}, TP {each.tp}, {each.target.arch}, on the {'host' if device == 'host' else 'GPU'}",
            title_justify="left",
        )
        for column in ("tokens", "output", "elements", "exact", "max error", ""):
            table.add_column(column, justify="left" if column in ("output", "") else "right")
        with waiting.status(f"loading or compiling {each.target.arch}'s kernel") as status:  # seen on a terminal only
            kernel = load(each.spec, "cpu" if device == "host" else "cuda", arch=each.target.arch, pdl=pdl)
            status.update(f"comparing {each.target.arch}'s kernel with the oracle")
            for count, comparisons in checker.verify(kernel, counts, seed=seed):
                for part in comparisons:
                    failed += not part.passed
                    verdict = "ok" if part.passed else f"FAILED: {part.outside} outside rounding, {part.stray} stray bytes"
                    table.add_row(str(count), part.name, str(part.elements), part.exact_percent, f"{part.max_error:.3g}", verdict)
        console.print(table)
    print("max error: in stored values, before the scale; ok: rounding explains every element")
    if failed:
        raise VerificationError(f"{failed} of the comparisons above failed: the oracle does not explain what the kernel wrote")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(parser=_folder, metavar="DIR", help="A folder that `mlagen build` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Show what built kernels cost: registers, memory, spills, waves and, for AMD, matrix and memory instructions."""
    from mlagen.manifest import damaged_files, read_manifest

    kernels = read_manifest(folder)
    damage = damaged_files(folder, kernels)
    if as_json:
        print(json.dumps({"kernels": kernels, "damaged": damage}, indent=1, sort_keys=True))
    else:
        _print_kernels(kernels, _resource_cells, _instruction_cells)
        for line in damage:
            print(line)
    if damage:
        raise BuildError(f"{folder}: {len(damage)} of its files are missing or not what was built; build them again")


RESOURCE_COLUMNS = {
    "amd": ("vgprs", "agprs", "sgprs", "lds_bytes", "scratch_bytes", "vgpr_spills", "sgpr_spills", "waves_per_simd"),
    "nvidia": ("registers", "shared_bytes", "local_bytes", "spill_store_bytes", "spill_load_bytes", "waves_per_simd"),
}

Entry = Mapping[str, Any]
Cells = Callable[[Entry], dict[str, str]]
"""What a table says of a manifest entry, by column; nothing where its platform has nothing to say."""


def _platform(entry: Entry) -> str:
    """The platform of a kernel, also of one for an arch that this version does not know."""
    return "nvidia" if entry["arch"].startswith("sm_") else "amd"


def _resource_cells(entry: Entry) -> dict[str, str]:
    columns = RESOURCE_COLUMNS[_platform(entry)]
    return {column.replace("_", " "): str(entry["resources"].get(column, "?")) for column in columns}


def _instruction_cells(entry: Entry) -> dict[str, str]:
    """Static counts, of assembly, which NVIDIA's compilers do not write; widths in bits."""
    if _platform(entry) == "nvidia":
        return {}
    mix = entry["instructions"]
    return {
        "instructions": str(mix.get("total", "?")),
        "MFMA": _tally(mix.get("mfma"), ""),
        "global loads": _tally(mix.get("global_loads"), " bit"),
        "global stores": _tally(mix.get("global_stores"), " bit"),
        "scalar loads": str(mix.get("scalar_loads", "?")),
        "LDS": str(mix.get("lds", "?")),
        "barriers": str(mix.get("barriers", "?")),
    }


def _tally(counts: Any, unit: str) -> str:
    if not isinstance(counts, dict):
        return "?"
    return ", ".join(f"{count} x {key}{unit}" for key, count in counts.items()) or "none"


def _print_kernels(kernels: Mapping[str, Entry], *kinds: Cells) -> None:
    """Tables of each kind where they fit the terminal, else a paragraph for each kernel: names of kernels are long."""
    console = plain_console()
    tables = []
    for cells in kinds:
        for platform in RESOURCE_COLUMNS:
            rows = {name: said for name, entry in kernels.items() if _platform(entry) == platform and (said := cells(entry))}
            if rows:
                tables.append(_kernel_table(rows))
    unlimited = console.options.update(max_width=10_000)
    if all(console.measure(table, options=unlimited).maximum <= console.width for table in tables):
        console.print(*tables)
        return
    for name, entry in kernels.items():
        console.print(name, soft_wrap=True)
        for cells in kinds:
            if text := "; ".join(f"{column}: {value}" for column, value in cells(entry).items()):
                console.print(Padding(text, (0, 0, 0, 4)))


def _kernel_table(rows: Mapping[str, dict[str, str]]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("kernel", no_wrap=True)
    for column in next(iter(rows.values())):
        numbers = all(row[column].isdigit() for row in rows.values())
        table.add_column(column, justify="right" if numbers else "left", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *row.values())
    return table


app.command()(cli_bench.bench)
app.command()(cli_tune.tune)
app.command()(cli_tools.doctor)
app.command()(cli_graph.explain_graph)
app.add_typer(cli_tools.cache, name="cache")


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
    _prepare_streams()
    warnings.formatwarning = _warning_text
    try:
        status = app(prog_name="mlagen", standalone_mode=False)
        sys.stdout.flush()
        if status == INTERRUPTED:
            _report("interrupted; nothing is left half-written")
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        hint = f"; see `{context.command_path} --help`" if context else ""
        message = error.format_message() or "name a command"  # it was called with nothing, and has printed its help
        _report(f"{_one_line(message.rstrip('.'))}{hint}")
        status = error.exit_code
    except RequestError as error:
        _report(_one_line(str(error)))
        status = error.exit_status
    except MlagenError as error:
        _report(str(error))  # whole, as a compiler's words are
        status = error.exit_status
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered would fail again at the end
        if not isinstance(error, BrokenPipeError):  # a reader such as `head` that has enough is no failure worth a word
            _report(f"{error.filename or 'output'}: {error.strerror or error}; make room, or name another place")
        status = 1
    sys.exit(status)


def _prepare_streams() -> None:
    """Make printing work where a stream is closed, and where its encoding cannot spell a path."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _warning_text(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A warning of mlagen's own as one line, like an error: who types a command need not see the code that warned."""
    if category.__module__.partition(".")[0] == "mlagen":
        return f"mlagen: {_one_line(str(message))}\n"
    return _python_text(message, category, filename, lineno, line)


def _one_line(text: str) -> str:
    """`text` with what is not printable, such as a newline in a path, spelled out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _report(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"mlagen: {message}", file=sys.stderr)
