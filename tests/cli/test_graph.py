"""mlagen explain-graph: what it says of a program, whatever the program does."""

import json

import pytest
import torch
from cli.command import run

pytestmark = pytest.mark.host

PROGRAM = """
import sys
import fx_models, mlagen.fx, torch

layer = fx_models.SPELLINGS[sys.argv[1]]()
x, slots, positions = fx_models.batch(4)

def step():
    with torch.no_grad():
        torch.compile(layer)(x, fx_models.new_cache(layer), slots, positions)

print("a word of its own")
"""


@pytest.fixture(autouse=True)
def _start_over():
    torch._dynamo.reset()


@pytest.fixture
def explain(tmp_path):
    def explain_(last, *words, name="Einsum"):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM + last + "\n")
        return run("explain-graph", *words, path, name)

    return explain_


def test_a_program_whose_prologue_is_fused(explain):
    found = explain("step()")
    assert found.status == 0
    assert "graph 1: FuseProloguePass: 1 replaced; " in found.out
    assert "and index_put: fused as " in found.out
    assert "fx_models.py:" in found.out
    assert "in quantize: return (x.float()" in found.out
    assert found.out.endswith("1 prologue replaced in 1 graph\n")
    assert found.err == "a word of its own\n"


def test_json_says_why_not(explain):
    found = explain("step()", "--json", name="Matmul")
    assert found.status == 1
    report = json.loads(found.out)
    (graph,) = report["graphs"]
    assert report["failure"] is None
    assert graph["changed"] == 0
    assert graph["nodes_before"] == graph["nodes_after"] > 100
    assert 0 < graph["seconds"] < 10
    assert any("made by division" in site["detail"] and site["outcome"] == "left" for site in graph["sites"])
    assert found.err.endswith("no prologue was replaced, see above\n")


@pytest.mark.parametrize(
    ("words", "name", "replaced"),
    [(["--division-as-product"], "Matmul", 1), (["--max-tokens", "3"], "Einsum", 0), (["--lift"], "Einsum", 1)],
    ids=["division", "max-tokens", "lift"],
)
def test_options_are_those_of_the_config(explain, words, name, replaced):
    found = explain("step()", "--json", *words, name=name)
    assert found.status == 1 - replaced
    assert [each["changed"] for each in json.loads(found.out)["graphs"]] == [replaced]


def test_the_programs_own_config_goes_first(explain):
    found = explain("with mlagen.fx.fused_prologue(mlagen.fx.FusionConfig(enabled=True, max_tokens=3)):\n    step()")
    assert found.status == 1
    assert "4 rows, which may be more than 3" in found.out
    assert found.out.count("graph ") == 1


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (
            "step()\nraise ValueError('out of cheese')",
            "raised ValueError: out of cheese (program.py:14); what is above was seen before",
        ),
        ("step()\nsys.exit(3)", "ended with exit status 3; what is above was seen before"),
        (
            "import no_such_module",
            "raised ModuleNotFoundError: No module named 'no_such_module' (program.py:13); it had compiled nothing",
        ),
        ("sys.exit()", "compiled nothing: call a torch.compile'd function in it"),
    ],
    ids=["raises", "exits", "raises at once", "compiles nothing"],
)
def test_programs_that_end_badly(explain, last, words):
    found = explain(last)
    assert found.status == 1
    assert words in found.err
    assert ("1 replaced" in found.out) == ("step()" in last)
    assert "step()" in last or not found.out, "no summary of nothing"


def test_a_function_of_a_module(tmp_path, monkeypatch):
    text = PROGRAM.replace("sys.argv[1]", "'Einsum'")
    (tmp_path / "program_of_a_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = run("explain-graph", "program_of_a_module:step")
    assert found.status == 0
    missing = run("explain-graph", "program_of_a_module:leap")
    assert missing.status == 1
    assert "raised AttributeError" in missing.err


@pytest.mark.parametrize("program", ["missing.py", "a b:c", "module:", ":name"])
def test_no_program(program):
    found = run("explain-graph", program)
    assert found.status == 2
    assert f"{program!r}: no such file; name a Python file or MODULE:FUNCTION" in found.err


def test_an_arch_that_is_none(explain):
    found = explain("step()", "--arch", "gfx1")
    assert found.status == 2
    assert "arch='gfx1': must be one of" in found.err
