"""The templates, and Jinja's environment for them.

Jinja takes ten times as long to compile them as to render a kernel, longer than all else that a kernel from the disk takes.  So a
process can be handed what another one compiled; template_cache.py keeps it.
"""

import functools
import importlib.metadata
import importlib.util
import marshal
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import resources
from types import CodeType
from typing import Any

import jinja2

SYNTAX: Mapping[str, Any] = {
    "variable_start_string": "${",
    "variable_end_string": "}",
    "block_start_string": "<%",
    "block_end_string": "%>",
    "comment_start_string": "<#",
    "comment_end_string": "#>",
    "line_statement_prefix": "//%",
    "keep_trailing_newline": True,
    "autoescape": False,
}
"""The options that move what Jinja makes of a template."""


@functools.cache
def template_texts() -> Mapping[str, str]:
    """Every template by name, such as "lib/amd.h"; read once, so that what is compiled is what identity() tells of."""
    return dict(sorted(_texts(resources.files("mlagen").joinpath("templates"), "")))


def _texts(folder: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _texts(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry.read_text(encoding="utf-8")


class _Loader(jinja2.BaseLoader):
    """Templates by name, out of `compiled`, which takes up what is compiled here."""

    def __init__(self) -> None:
        self.compiled: dict[str, CodeType] = {}

    def load(
        self,
        environment: jinja2.Environment,
        name: str,
        globals: MutableMapping[str, Any] | None = None,  # noqa: A002
    ) -> jinja2.Template:
        if name not in self.compiled:
            self.compiled[name] = environment.compile(template_texts()[name], name)
        return environment.template_class.from_code(environment, self.compiled[name], globals if globals is not None else {})


_loader = _Loader()


@functools.cache
def environment() -> jinja2.Environment:
    return jinja2.Environment(loader=_loader, undefined=jinja2.StrictUndefined, **SYNTAX)


def identity() -> tuple[str, str, tuple[str, ...]]:
    """What the compiled templates depend on: their source, the compiler, and its options."""
    source = "".join(f"{name} {len(text)}\n{text}" for name, text in template_texts().items())
    python = f"{sys.implementation.cache_tag} {importlib.util.MAGIC_NUMBER.hex()}"
    options = tuple(f"{name}={value!r}" for name, value in SYNTAX.items())
    return source, f"Jinja {importlib.metadata.version('jinja2')} for {python}", options


def any_compiled() -> bool:
    """Whether this process has compiled templates, its own or others'."""
    return bool(_loader.compiled)


def compile_templates() -> bytes:
    """All templates, compiled, in a form that use_compiled() takes."""
    return marshal.dumps({name: environment().compile(text, name) for name, text in template_texts().items()})


def use_compiled(templates: bytes) -> None:
    """Take these instead of compiling any more.  They run in this process: they must be what compile_templates() gave."""
    _loader.compiled.update(marshal.loads(templates))
