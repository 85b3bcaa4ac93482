"""The commands that look after an installation: `mlagen cache` and `mlagen doctor`."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlagen.cli_options import AsJson
from mlagen.errors import MlagenError

DIGEST_LETTERS = 12

cache = typer.Typer(no_args_is_help=True, help="Look after the cache of compiled kernels.")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def _kernels(count: int) -> str:
    return f"{count} kernel{'' if count == 1 else 's'}"


@cache.command()
def path() -> None:
    """Print where the cache is."""
    from mlagen.cache import cache_root

    print(cache_root())


@cache.command("list")
def list_(as_json: AsJson = False) -> None:
    """List what is in the cache."""
    from mlagen.cache import DiskCache

    store = DiskCache()
    store.refuse_unsafe()
    rows = [_describe(folder) for folder in store.entries()]
    if as_json:
        print(json.dumps(rows, indent=1, sort_keys=True))
        return
    table = Table(box=None, header_style="bold")
    for column in ("digest", "kernel", "kind", "arch", "KiB", "when"):
        table.add_column(column, justify="right" if column == "KiB" else "left", no_wrap=column != "kernel", overflow="fold")
    for row in rows:
        if row["damage"]:
            kernel, kind, arch = f"damaged: {row['damage']}", "", ""
        else:
            kernel, kind, arch = row["kernel"], row["kind"], row["arch"]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["modified"]))
        size = f"{row['bytes'] / 1024:.0f}"
        table.add_row(row["digest"][:DIGEST_LETTERS], escape(kernel), kind, arch, size, when)
    if rows:
        _console().print(table)
    aside = len(list(store.damaged()))
    print(f"{_kernels(len(rows))} in {store.root}" + (f", and {aside} damaged set aside" if aside else ""))


def _describe(folder: Path) -> dict[str, Any]:
    from mlagen.cache import read_entry

    entry, damage = read_entry(folder)
    meta = entry.meta if entry else {}
    key = meta.get("key", {})
    about = {name: str(meta.get(name, "?")) for name in ("kernel", "arch", "compiler")}
    files = [file.stat() for file in folder.iterdir()] if folder.is_dir() else []
    modified = max((file.st_mtime for file in files), default=folder.lstat().st_mtime)
    size = sum(file.st_size for file in files)
    return {"digest": folder.name, "kind": key.get("kind"), **about, "bytes": size, "modified": modified, "damage": damage}


@cache.command()
def verify() -> None:
    """Check every kernel in the cache against its hashes.  Exit status 1 if one is damaged; the next load builds it again."""
    from mlagen.cache import DiskCache, read_entry

    store = DiskCache()
    store.refuse_unsafe()
    folders = list(store.entries())
    damaged = 0
    for folder in folders:
        _, damage = read_entry(folder)
        if damage:
            damaged += 1
            print(f"mlagen: {folder}: {damage}", file=sys.stderr)
    print(f"{_kernels(len(folders))} in {store.root}, {damaged} damaged")
    raise typer.Exit(1 if damaged else 0)


@cache.command()
def clear() -> None:
    """Remove every kernel from the cache."""
    from mlagen.cache import DiskCache
    from mlagen.template_cache import template_cache

    store = DiskCache()
    try:
        count = store.clear()
        template_cache(store).clear()
    except OSError as error:
        raise MlagenError(f"cache {store.root}: cannot remove {error.filename}: {error.strerror}") from None
    print(f"removed {_kernels(count)} from {store.root}")


def doctor(as_json: AsJson = False) -> None:
    """Say what works here, what is missing and how to get it.  Exit status 1 if nothing here can build a kernel."""
    from mlagen.doctor import Finding, examine

    report = examine()
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), "builders": report.builders}, indent=1, sort_keys=True))
        raise typer.Exit(0 if report.builders else 1)
    console = _console()
    for section in dataclasses.fields(report):
        findings = getattr(report, section.name)
        console.print(f"[bold]{section.name}[/]")
        if isinstance(findings, dict):
            console.print("  " + escape(", ".join(f"{name} {version or '-'}" for name, version in findings.items())))
            continue
        width = max((len(each.name) for each in findings), default=0)
        for each in findings:
            assert isinstance(each, Finding), "every other section is a list of findings"
            console.print(f"  {'[green]ok[/]' if each.works else '[red]--[/]'} {escape(each.name):<{width}}  {escape(each.detail)}")
            if each.remedy:
                console.print(f"     {'':<{width}}  -> {escape(each.remedy)}")
        if not findings:
            console.print("  none")
    if report.builders:
        print(f"kernels can be built here: {', '.join(report.builders)}")
    else:
        print("mlagen: no compiler for a GPU works here: pip install ziglang", file=sys.stderr)
    raise typer.Exit(0 if report.builders else 1)
