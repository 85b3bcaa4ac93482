"""torch.compile of the separate operators, for the CPU."""

import pytest
import torch
from clock import measured
from helpers import small_spec

pytestmark = [pytest.mark.host, pytest.mark.slow]


@pytest.mark.parametrize(
    ("peer", "changes"),
    [("compile", {}), ("bmm+compile", {}), ("compile", {"weight": "none", "rope_style": "neox", "kv_dtype": "bf16"})],
)
def test_compiled_operators_are_right(peer, changes):
    torch.compiler.reset()
    assert not measured(peer, small_spec(**changes), "sm_90").failures
