"""Fixtures of the passes' tests."""

import pytest
import torch
import torch._inductor.config


@pytest.fixture(autouse=True)
def _start_over():
    """No graph of an earlier test or run."""
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        yield
