"""The options that say which kernel is meant: every command has all of them, and each sets the field that it is for."""

import inspect

import pytest
from cli.command import line, run

from mlagen import PrologueSpec, cli, cli_bench, cli_tune
from mlagen.cli_options import SPEC_OPTIONS, changed
from mlagen.errors import RequestError

COMMANDS = {"build": cli, "verify": cli, "bench": cli_bench, "tune": cli_tune}
DEFAULTS = {name: each.default for name, each in inspect.signature(PrologueSpec.from_model).parameters.items()}


@pytest.fixture
def asked(monkeypatch):
    """The keywords with which a command asks for a spec; it gets no further."""
    asked = {}

    def request(model, tp, target, **options):
        asked.update(options)
        raise RequestError("asked")

    for module in COMMANDS.values():
        monkeypatch.setattr(module, "request", request)
        monkeypatch.setattr(module, "gpu_arch", lambda *arguments: "gfx950")
    return asked


def another(option):
    """What to type for a value of the field that is not its default, and the value."""
    default = DEFAULTS[option.field]
    if isinstance(default, bool):
        return [option.flag], not default
    value = {int: 3, type(None): 2.0 if option.field == "fp8_max" else "other"}.get(type(default), "other")
    return [option.flag, str(value)], value


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_every_option(command, asked):
    for option in SPEC_OPTIONS:
        typed, value = another(option)
        assert line(run(command, "deepseek-r1", *typed), 2) == "asked"
        assert asked == {**{each.field: DEFAULTS[each.field] for each in SPEC_OPTIONS}, option.field: value}
        assert changed(asked) == {option.field: " ".join(typed)}
        assert option.help in " ".join(run(command, "--help").out.replace("│", " ").split())


def test_every_field_has_an_option():
    assert sorted(each.field for each in SPEC_OPTIONS) == sorted(DEFAULTS.keys() - {"model", "tp"})


def test_the_command_line_has_the_defaults_of_python(asked):
    run("verify", "deepseek-r1")
    assert asked == {each.field: DEFAULTS[each.field] for each in SPEC_OPTIONS}
    assert changed(asked) == {}
