"""Compiled templates in the cache: they render the same text, nothing is compiled where they are there, and only these are run."""

import os
import sys
import types

import jinja2
import pytest

from mlagen import rendering, template_cache
from mlagen.cache import BINARY, CacheWarning, DiskCache
from mlagen.codegen import generate
from mlagen.errors import MlagenError
from mlagen.target import TARGETS
from mlagen.template_cache import prepare_templates, template_key


@pytest.fixture
def new_process(monkeypatch):
    """Makes this process forget what is compiled."""

    def forget():
        monkeypatch.setattr(rendering, "_loader", rendering._Loader())
        rendering.environment.cache_clear()

    forget()
    yield forget
    rendering.environment.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """The names of the templates that Jinja compiled from now on."""
    names, compile_ = [], jinja2.Environment.compile

    def spy(self, source, name=None, *arguments, **options):
        names.append(name)
        return compile_(self, source, name, *arguments, **options)

    monkeypatch.setattr(jinja2.Environment, "compile", spy)
    return names


def texts(spec):
    """What every target's kernel of `spec` is, and its host build, rendered anew."""
    kernels = [generate.__wrapped__(spec, target, aligned=aligned) for target in TARGETS.values() for aligned in (True, False)]
    return [text for kernel in kernels for text in (kernel.source, kernel.host_source)]


def test_they_render_what_jinja_compiles_on_the_spot(spec, new_process, compiled):
    expected = texts(spec)
    for _ in range(2):
        new_process()
        prepare_templates(DiskCache(), publish=True)
        assert rendering.any_compiled()
        compiled.clear()
        assert texts(spec) == expected
        assert compiled == []


def test_who_has_compiled_some_needs_none(spec, new_process, compiled, cache_root):
    texts(spec)
    compiled.clear()
    prepare_templates(DiskCache(), publish=True)
    assert not cache_root.exists()
    assert compiled == []


def test_without_leave_to_publish_nothing_is_written(new_process, cache_root):
    prepare_templates(DiskCache(), publish=False)
    assert not cache_root.exists()
    assert not rendering.any_compiled()


def test_they_are_no_kernels(new_process):
    prepare_templates(DiskCache(), publish=True)
    assert list(DiskCache().entries()) == []


# Which ones


TEXTS = rendering.template_texts()


def with_texts(texts):
    return lambda patch: patch.setattr(rendering, "template_texts", lambda: texts)


PERTURBED = {
    "a template's text": with_texts({**TEXTS, "lib/amd.h": TEXTS["lib/amd.h"] + " "}),
    "a template's name": with_texts({f"{name}x": text for name, text in TEXTS.items()}),
    "one template less": with_texts(dict(list(TEXTS.items())[1:])),
    "Jinja": lambda patch: patch.setattr("importlib.metadata.version", lambda name: "99"),
    "Python's bytecode": lambda patch: patch.setattr("importlib.util.MAGIC_NUMBER", b"0000"),
    "Python": lambda patch: patch.setattr(sys, "implementation", types.SimpleNamespace(cache_tag="pypy39")),
    "the ABI": lambda patch: patch.setattr(template_cache, "ABI_VERSION", 99),
    **{
        f"option {name}": lambda patch, name=name: patch.setattr(rendering, "SYNTAX", {**rendering.SYNTAX, name: "other"})
        for name in rendering.SYNTAX
    },
}


@pytest.mark.parametrize("perturb", PERTURBED.values(), ids=PERTURBED.keys())
def test_what_moves_them_moves_their_key(perturb, monkeypatch):
    before = template_key().digest
    with monkeypatch.context() as patch:
        perturb(patch)
        assert template_key().digest != before
    assert template_key().digest == before


def test_names_and_texts_are_told_apart(monkeypatch):
    """The same bytes, cut elsewhere, are other templates."""
    keys = []
    for texts_ in ({"a": "x", "b": "y"}, {"a": "x\nb 1\ny"}):
        with_texts(texts_)(monkeypatch)
        keys.append(template_key().digest)
    assert keys[0] != keys[1]


def test_every_option_of_the_environment_that_moves_code_is_in_the_key(new_process):
    """All that is not Jinja's default, but for how undefined names behave, which no compiled template knows."""
    ours, defaults = rendering.environment(), jinja2.Environment()
    plain = [name for name, value in vars(defaults).items() if isinstance(value, str | bool | int | None)]
    assert {name for name in plain if getattr(ours, name) != getattr(defaults, name)} <= {*rendering.SYNTAX, "loader"}
    assert ours.extensions == defaults.extensions


# Trust, as for kernels: it is code that runs in this process


@pytest.fixture
def stored(new_process):
    """The file of the compiled templates, and nothing compiled in this process."""
    prepare_templates(DiskCache(), publish=True)
    new_process()
    (folder,) = template_cache.template_cache(DiskCache()).entries()
    return folder / BINARY


@pytest.mark.parametrize(
    ("break_", "reason"),
    [
        (lambda path: os.truncate(path, 1000), "sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0"), "sha256"),
        (lambda path: path.chmod(0o666), "others can write"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["truncated", "changed", "open to others", "missing"],
)
def test_others_than_just_these_are_not_run(spec, stored, compiled, monkeypatch, break_, reason):
    break_(stored)
    with pytest.warns(CacheWarning, match=reason):
        prepare_templates(DiskCache(), publish=True)
    assert len(compiled) == len(rendering.template_texts())
    compiled.clear()
    texts(spec)
    assert compiled == []


def test_damage_is_passed_over_where_nothing_may_be_published(stored, compiled):
    os.truncate(stored, 1000)
    prepare_templates(DiskCache(), publish=False)
    assert not rendering.any_compiled()


@pytest.mark.parametrize("place", ["root", "folder"])
def test_an_unsafe_cache_is_refused(stored, cache_root, place):
    (cache_root if place == "root" else stored.parents[1]).chmod(0o777)
    with pytest.raises(MlagenError, match="others can write to it"):
        prepare_templates(DiskCache(), publish=True)
    assert not rendering.any_compiled()


# Loads in processes of their own

LOAD = """
import sys, jinja2, mlagen.runtime
compiled, rendered = [], []
compile_, render = jinja2.Environment.compile, jinja2.Template.render
jinja2.Environment.compile = lambda self, *arguments: compiled.append(arguments[1]) or compile_(self, *arguments)
jinja2.Template.render = lambda self, *arguments, **options: rendered.append(self.name) or render(self, *arguments, **options)
spec = mlagen.PrologueSpec(heads=2, nope_dim=32, lora_rank=64, rope_dim=16, rope_style="gptj")
mlagen.runtime.load(spec, "cpu", arch="gfx950")
print(len(compiled), rendered.count("kernel.hip.j2"))
"""


@pytest.mark.host
def test_a_warm_load_compiles_no_template_and_renders_only_what_its_key_is_made_of(compiler, run):
    all_of_them = len(rendering.template_texts())
    assert run(LOAD).split() == [str(all_of_them), "1"]
    assert run(LOAD).split() == ["0", "1"]
    assert run(LOAD, MLAGEN_JIT="0").split() == ["0", "1"]
    assert compiler.compiles == 1
