"""`mlagen bench`: the request is checked before anything is timed; each row is told as it is done, and all of them at the end."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mlagen import __version__
from mlagen.cli_files import file_name, refuse_unwritable, write_whole
from mlagen.cli_options import AsJson, Model, SpecOptions, Tp, gpu_arch, parse_tokens, plain_console, with_spec_options
from mlagen.errors import MlagenError, RequestError, VerificationError
from mlagen.shipped import Request, request
from mlagen.target import find_target

if TYPE_CHECKING:
    from mlagen.bench.report import Report
    from mlagen.bench.run import Row
    from mlagen.peers.peer import Peer

DEVICE_HELP = "cuda or hip, as torch is built. Default: the GPU that torch sees."
PEERS_HELP = "all, none, or some of eager, compile, bmm, bmm+compile, bmm+flashinfer, bmm+aiter, aiter-triton, separated by commas."


@with_spec_options
def bench(
    model: Model,
    tp: Tp = 1,
    *,
    options: SpecOptions,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,8,32,64,128,256",
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    peers: Annotated[str, typer.Option(help=PEERS_HELP)] = "all",
    layers: Annotated[int, typer.Option(min=1, help="Launches in a graph; more are taken where W_UK would stay in a cache.")] = 61,
    repeats: Annotated[int, typer.Option(min=1, help="Replays of each graph, of which the median counts.")] = 30,
    csv: Annotated[Path | None, typer.Option("--csv", parser=file_name, metavar="FILE", help="Write the times to it.")] = None,
    plot: Annotated[Path | None, typer.Option(parser=file_name, metavar="FILE", help="Draw them: NAME.svg or NAME.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time a model's kernel on this GPU, beside its peers and a kernel that only reads and writes the same bytes."""
    counts = list(dict.fromkeys(parse_tokens(tokens, least=1)))
    if device in ("cpu", "host"):
        raise RequestError(f"--device {device}: times of the host run mean nothing; use cuda or hip, where there is a GPU")
    if device not in ("cuda", "hip", None):
        raise RequestError(f"--device {device}: expected cuda or hip")
    files = {option: path for option, path in (("--csv", csv), ("--plot", plot)) if path}
    for option, path in files.items():
        refuse_unwritable(option, path)
    if len(set(files.values())) < len(files):
        raise RequestError(f"--csv and --plot are both {csv}; name two files")
    try:
        from mlagen.bench.plot import draw, require_plot
        from mlagen.bench.report import csv_text, json_text
        from mlagen.peers.registry import chosen_peers
    except ModuleNotFoundError as error:
        raise MlagenError(f"bench needs {error.name}, which is not installed: pip install 'mlagen[torch]'") from None
    chosen = chosen_peers(peers)
    ending = require_plot(plot) if plot else ""
    target = find_target(gpu_arch(device))
    wanted = request(model, tp, target, **options)
    with contextlib.redirect_stdout(sys.stderr):  # what a peer says while it works is no result
        report = _measure(wanted, chosen, counts, layers, repeats)
    if as_json:
        print(json_text(report), end="")
    else:
        _print(report, chosen)
    contents: dict[str, Callable[[], bytes]] = {"--csv": lambda: csv_text(report).encode(), "--plot": lambda: draw(report, ending)}
    for option, path in files.items():
        write_whole(option, path, contents[option]())
    _refuse_failure(report)


def _measure(wanted: Request, peers: Sequence["Peer"], counts: Sequence[int], layers: int, repeats: int) -> "Report":
    """Run the bench, telling on standard error how far it is."""
    import torch

    from mlagen.bench import run
    from mlagen.bench.report import Report
    from mlagen.runtime import load
    from mlagen.timing.floor import Floor

    spec, target = wanted.spec, wanted.target
    kernel = load(spec, "cuda")
    early = load(spec, "cuda", pdl=True) if target.dependent_launch else None
    left_out = {peer.name: peer.left_out(spec, target) for peer in peers}
    fit = [peer for peer in peers if not left_out[peer.name]]
    methods = run.methods_of(kernel, Floor(target, kernel.device), fit, early)
    layers = run.layers_of(spec, target, fit, layers)
    rows = []
    for row in run.bench(kernel, methods, counts, layers=layers, repeats=repeats):
        rows.append(row)
        print(f"{_tokens(row)} ({len(rows)}/{len(counts)}): {_times(row)}", file=sys.stderr)
    return Report(
        model=wanted.model,
        tp=wanted.tp,
        heads=spec.heads,
        arch=target.arch,
        device=torch.cuda.get_device_name(),
        torch=str(torch.__version__),
        mlagen=__version__,
        layers=layers,
        repeats=repeats,
        methods=list(methods),
        rows=rows,
        left_out={name: reason for name, reason in left_out.items() if reason},
    )


def _tokens(row: "Row") -> str:
    return f"{row.tokens} token{'' if row.tokens == 1 else 's'}"


def _times(row: "Row") -> str:
    return ", ".join([*(f"{name} {us:.2f}" for name, us in row.us.items()), *(f"{name} -" for name in row.failures)])


def _print(report: "Report", peers: Sequence["Peer"]) -> None:
    from mlagen.bench.run import EARLY, OWN

    table = Table(
        box=None,
        header_style="bold",
        title=f"{report.model}, TP {report.tp}, {report.heads} heads, {report.device} ({report.arch})",
        title_justify="left",
    )
    table.add_column("tokens", justify="right")
    for method in report.methods:
        table.add_column(method, justify="right")
        if method == OWN:
            table.add_column("/ stream", justify="right")
    for row in report.rows:
        cells = [str(row.tokens)]
        for method in report.methods:
            cells.append(f"{row.us[method]:.2f}" if method in row.us else "-")
            if method == OWN:
                cells.append("-" if row.ratio is None else f"{row.ratio:.2f}")
        table.add_row(*cells)
    console = plain_console()
    console.print(table)
    print(f"microseconds per layer: medians of {report.repeats} replays of {report.layers} layers in one graph")
    print("empty: a launch that does nothing; stream: one that only reads and writes the same bytes")
    if EARLY in report.methods:
        print(f"{EARLY}: load(pdl=True), each launch may start before the one before it has ended")
    for peer in peers:
        if peer.name in report.methods:
            print(f"{peer.name}: {peer.description}")
    if report.left_out:
        print("left out: " + ", ".join(f"{name} ({reason})" for name, reason in report.left_out.items()))
    for row in report.rows:
        for method, reason in row.failures.items():
            print(f"{method}, {_tokens(row)}: {reason}")


def _refuse_failure(report: "Report") -> None:
    from mlagen.bench.run import OWN

    for row in report.rows:
        if OWN in row.failures:
            raise VerificationError(f"mlagen's own kernel has no time for {_tokens(row)}: {row.failures[OWN]}")
