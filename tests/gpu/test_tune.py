"""A small tuning on the GPU: every candidate is right, and the table is one that load takes."""

import pytest
from cli.command import run

from mlagen.tables import read_table

pytestmark = pytest.mark.gpu


def test_the_command(tmp_path):
    table = tmp_path / "table.json"
    result = run("tune", "deepseek-r1", "--tp", "1", "--tokens", "1,33", "--layers", "3", "--repeats", "2", "--out", table)
    assert result.status == 0, result
    _, entries = read_table(table.read_text(), "it")
    assert all(us > 0 for entry in entries for pair in entry.found.values() for us in pair)
