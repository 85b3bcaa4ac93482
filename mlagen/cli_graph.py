"""`mlagen explain-graph`: a user's program runs as it is, and the passes say what they find in the graphs that it compiles."""

import contextlib
import dataclasses
import importlib
import json
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlagen.cli_options import AsJson, plain_console
from mlagen.errors import MlagenError, RequestError, VerificationError
from mlagen.shipped import ARCHS

if TYPE_CHECKING:
    from mlagen.fx.report import GraphReport

PROGRAM_HELP = "A Python file, or MODULE:FUNCTION, which is called without arguments."
ARCH_HELP = f"Whose kernels the CPU runs where there is no GPU. Default: {ARCHS[-1]}."
MAX_TOKENS_HELP = "Graphs of more rows are left alone. Default: 256, as FusionConfig's; 0: no limit."


def explain_graph(
    program: Annotated[str, typer.Argument(help=PROGRAM_HELP)],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its own arguments; those with dashes after --.")] = None,
    arch: Annotated[str | None, typer.Option(help=ARCH_HELP)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=0, help=MAX_TOKENS_HELP)] = None,
    division_as_product: Annotated[
        bool, typer.Option("--division-as-product", help="Let x / scale be x * (1 / scale), which may round otherwise.")
    ] = False,
    lift: Annotated[bool, typer.Option("--lift", help="Lift the query's preparation instead of fusing the prologue.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a program that uses torch.compile, and say what of it becomes one kernel, and why the rest does not.

    Exit status 0 if a prologue was found and replaced, 1 if none was or the program failed.
    """
    run = _runner(program, arguments or [])
    try:
        import torch

        from mlagen.fx import FusionConfig, explained
    except ModuleNotFoundError as error:
        raise MlagenError(f"explain-graph needs {error.name}, which is not installed: pip install 'mlagen[torch]'") from None
    on_gpu = torch.cuda.is_available()
    limit = max_tokens if max_tokens != 0 else float("inf")
    config = FusionConfig(
        enabled=True,
        arch=arch if on_gpu else arch or ARCHS[-1],
        max_tokens=limit,
        fuse=not lift,
        lift=lift,
        division_as_product=division_as_product,
    )
    with explained(config) as reports, contextlib.redirect_stdout(sys.stderr):  # what the program prints is no result of ours
        failure = run()
    if as_json:
        print(json.dumps({"program": program, "failure": failure, "graphs": [_as_dict(each) for each in reports]}, indent=1))
    elif reports:
        _print(reports)
    if failure:
        raise VerificationError(
            f"{program} {failure}; {'what is above was seen before' if reports else 'it had compiled nothing yet'}"
        )
    if not reports:
        raise VerificationError(
            f"{program} compiled nothing: call a torch.compile'd function in it, with inputs, under torch.no_grad()"
        )
    if not any(each.changed for each in reports):
        raise VerificationError(f"{program}: no prologue was replaced, see above")


def _runner(program: str, arguments: Sequence[str]) -> Callable[[], str | None]:
    """What runs a program and says how it failed.  Raises RequestError where it is none."""
    path = Path(program)
    module, _, name = program.partition(":")
    if path.is_file():
        return lambda: _run([program, *arguments], path.parent, lambda: runpy.run_path(program, run_name="__main__"))
    if not name or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise RequestError(f"{program!r}: no such file; name a Python file or MODULE:FUNCTION")

    def call() -> None:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        found()

    return lambda: _run([module, *arguments], Path.cwd(), call)


def _run(words: list[str], folder: Path, call: Callable[[], object]) -> str | None:
    """Call with a program's sys.argv and sys.path; how it failed, or None."""
    with _as_program(words, folder):
        try:
            call()
        except SystemExit as end:
            return None if end.code in (None, 0) else f"ended with exit status {end.code}"
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            return f"raised {type(error).__name__}: {first}{_place(error, folder)}"
    return None


def _place(error: Exception, folder: Path) -> str:
    """The last line of the program's own folder that an exception came through, in brackets; torch's own lines say nothing."""
    own = folder.resolve()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if own == Path(frame.filename).resolve().parent:
            return f" ({Path(frame.filename).name}:{frame.lineno})"
    return ""


@contextlib.contextmanager
def _as_program(words: list[str], folder: Path) -> Iterator[None]:
    before = sys.argv, list(sys.path)
    sys.argv, sys.path[:] = words, [str(folder), *sys.path]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before


def _as_dict(report: "GraphReport") -> dict[str, Any]:
    return dataclasses.asdict(report)


def _print(reports: Sequence["GraphReport"]) -> None:
    console = plain_console()
    for number, each in enumerate(reports, 1):
        found = "nothing replaced" if not each.changed else f"{each.changed} replaced"
        nodes = f"{each.nodes_before} nodes" + (f", {each.nodes_after} afterwards" if each.changed else "")
        console.print(f"graph {number}: {each.name}: {found}; {nodes}; {each.seconds * 1e3:.0f} ms", soft_wrap=True)
        for site in each.sites:
            console.print(f"  {site}", soft_wrap=True)
            if site.source:
                console.print(f"    {site.source}", soft_wrap=True)
        if not each.sites:
            console.print("  no operator that looks like the end of a query's preparation", soft_wrap=True)
    changed = sum(each.changed for each in reports)
    console.print(
        f"{changed} prologue{'' if changed == 1 else 's'} replaced in {len(reports)} graph{'' if len(reports) == 1 else 's'}"
    )
