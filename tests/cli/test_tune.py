"""mlagen tune: the model's tables, what is refused, and the table that a measurement writes."""

import pytest
import torch
from cli.command import line, run

from mlagen import cli_tune
from mlagen import tune as tuning
from mlagen.tables import choose_ranges, read_table
from mlagen.target import find_target
from mlagen.tune import Timing, candidates

MODEL = ("minicpm3", "--tp", "8")


def test_the_model_writes_the_shipped_table(tmp_path):
    table = tmp_path / "table.json"
    assert run("tune", "--device", "model", "--arch", "gfx950", "--out", table).status == 0
    result = run("tune", "--device", "model", "--arch", "gfx950")
    assert result.out == table.read_text()
    assert read_table(result.out, "it")[0] == "gfx950"
    assert "modelled" in result.out.splitlines()[3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "model"), "--arch is missing: the model knows gfx942 and gfx950; name one of them"),
        (("--device", "model", "--arch", "gfx950", "minicpm3"), "MODEL is minicpm3: the model of the hardware does all"),
        (("nope",), "nope"),
        (("--device", "model", "--arch", "sm_90"), "--arch sm_90: the model knows gfx942 and gfx950"),
        (("--device", "cpu", *MODEL), "--device cpu: expected cuda, hip or model"),
        (("--arch", "gfx950", *MODEL), "--arch goes with --device model"),
        ((), "MODEL: name a preset"),
        (("--tokens", "0", *MODEL), "--tokens is '0'"),
        (("--out", "/nowhere/table.json", *MODEL), "--out /nowhere/table.json: /nowhere: No such file or directory"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, said):
    result = run("tune", *arguments)
    assert result.status == 2
    assert said in line(result, 2)


@pytest.fixture
def gpu(monkeypatch):
    """Half a GPU: times come from a list."""

    def times(spec, target, device, counts, *, dependent, m_tiles, layers, repeats):
        for tokens in counts:
            ranges = candidates(spec, target, tokens, dependent=dependent, m_tiles=m_tiles)
            yield Timing(tokens, {each: 5.0 - each.layout.waves_per_workgroup / 4 for each in ranges}, 2.0)

    monkeypatch.setattr(cli_tune, "gpu_arch", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(tuning, "time_candidates", times)


def test_a_measurement_is_added_to_a_table(gpu, tmp_path):
    table = tmp_path / "table.json"
    for tp in ("8", "4", "8"):
        result = run("tune", "minicpm3", "--tp", tp, "--tokens", "64,1", "--out", table)
        assert result.status == 0, result
    assert "1 token: 3.00 us per layer, stream 2.00" in result.err
    assert "dependent launch, 64 tokens" in result.err
    arch, entries = read_table(table.read_text(), "it")
    assert arch == "sm_90"
    assert [(each.heads, each.dependent) for each in entries] == [(5, False), (5, True), (10, False), (10, True)]
    assert "H200" in table.read_text()


def test_a_table_says_which_kernels_were_timed(gpu, tmp_path):
    table = tmp_path / "table.json"
    options = ("--kv-dtype", "bf16", "--rope-first", "--weight", "fp8", "--compute", "a8")
    assert run("tune", *MODEL, *options, "--out", table).status == 0
    before = table.read_text()
    assert "on one H200, --kv-dtype bf16 --rope-first --compute a8: us per layer" in before
    assert '"weight_bits": 8' in before
    assert "name another file" in line(run("tune", *MODEL, "--out", table), 2)
    assert table.read_text() == before


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--weight=none", "weight='none': a table chooses how the absorb is done: there is nothing to tune"),
        ("--no-write-q", "weight='none': a table chooses"),
        ("--q-scaling=token", "q_scaling='token': a table's layouts do not make whole rows: there is nothing to tune"),
        ("--compute=a8", "compute='a8' with weight='bf16'"),
    ],
)
def test_kernels_that_have_no_table(gpu, option, said):
    assert said in line(run("tune", *MODEL, option), 2)


def test_another_gpus_table_is_left_alone(gpu, tmp_path):
    table = tmp_path / "table.json"
    run("tune", "--device", "model", "--arch", "gfx942", "--out", table)
    before = table.read_bytes()
    result = run("tune", *MODEL, "--out", table)
    assert (result.status, table.read_bytes()) == (2, before)
    assert "it is a table for gfx942, and this is for sm_90" in line(result, 2)


def test_a_table_has_one_source(gpu, tmp_path, monkeypatch):
    """What was measured elsewhere is not called measured here, and nothing modelled takes the place of a measurement."""
    table = tmp_path / "table.json"
    assert run("tune", *MODEL, "--tokens", "1", "--out", table).status == 0
    before = table.read_bytes()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    assert "H100" in line(run("tune", *MODEL, "--tokens", "1", "--out", table), 2)
    monkeypatch.setattr(cli_tune, "MODELLED", ("sm_90",))
    assert "modelled" in line(run("tune", "--device", "model", "--arch", "sm_90", "--out", table), 2)
    assert table.read_bytes() == before


def test_what_tune_writes_load_uses(gpu, tmp_path, monkeypatch):
    table = tmp_path / "table.json"
    assert run("tune", *MODEL, "--tokens", "1,64", "--out", table).status == 0
    monkeypatch.setenv("MLAGEN_TABLES", str(table))
    from mlagen.shipped import request

    spec = request("minicpm3", 8, find_target("sm_90")).spec
    _, entries = read_table(table.read_text(), "it")
    assert choose_ranges(spec, find_target("sm_90")) == entries[0].ranges
