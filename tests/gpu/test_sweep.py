"""The sweep of tests/sweep.py on the GPU that torch sees: every shape, layout and edge, with the GPU's own kernel."""

import pytest
from helpers import Workload, check
from sweep import HANDS, SPECS, kernel_with, label, other_layouts, spec_of

from mlagen.runtime import load

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("row", "hand"), list(zip(SPECS, HANDS, strict=True)), ids=map(label, SPECS))
def test_any_spec_with_any_launch(row, hand):
    for number, launch in enumerate(hand):
        workload = Workload(**{name: value for name, value in launch.items() if name != "heads"})
        check(load(spec_of(row, launch["heads"]), "cuda"), workload, seed=number)


@pytest.mark.parametrize(("row", "hand"), list(zip(SPECS, HANDS, strict=True)), ids=map(label, SPECS))
def test_any_spec_with_every_layout(row, hand):
    found = load(spec_of(row, 1), "cuda")
    for number, layout in enumerate(other_layouts(found.spec, found.target)):
        launch = hand[number % len(hand)]
        workload = Workload(**{name: value for name, value in launch.items() if name != "heads"})
        check(kernel_with(spec_of(row, launch["heads"]), found.target, found.device, layout), workload, seed=number)
