"""The kernels of a load for different numbers of tokens: the table says where each serves, and load(pdl=True) has others."""

from collections.abc import Sequence

import pytest
import torch
from helpers import Workload, check, small_spec
from torch._subclasses.fake_tensor import FakeTensorMode

from mlagen import ops, runtime
from mlagen.drivers.host import HostModule
from mlagen.errors import RequestError, ScheduleError
from mlagen.layout import Layout
from mlagen.runtime import Kernel, Variant, load
from mlagen.tables import Entry, Range, write_table

pytestmark = pytest.mark.host

SPEC = small_spec(lora_rank=128, nope_dim=32)
RANGES = (
    Range(8, Layout(), 1),
    Range(24, Layout(4, 16), 2),
    Range(40, Layout(4, 16), 4),
    Range(None, Layout(4, 32)),
)
DEPENDENT = (Range(16, Layout(1, None, True)), Range(None, Layout(4, 16, True), 2))


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """A table with these ranges, and nothing loaded yet."""
    path = tmp_path / "table.json"
    entries = [Entry(32, 128, 3, bool(ranges[0].layout.dependent), ranges) for ranges in (RANGES, DEPENDENT)]
    path.write_text(write_table("sm_90", "a test", entries))
    monkeypatch.setenv("MLAGEN_TABLES", str(path))
    monkeypatch.setattr(runtime, "_KERNELS", {})
    return path


@pytest.fixture
def launches(monkeypatch) -> list[tuple[HostModule, int, int]]:
    """Module, grid and lanes of a workgroup of every launch from now on."""
    seen: list[tuple[HostModule, int, int]] = []
    launch = HostModule.launch

    def spy(self, grid, block, parameters, shared_bytes=0):
        seen.append((self, grid, block))
        launch(self, grid, block, parameters, shared_bytes)

    monkeypatch.setattr(HostModule, "launch", spy)
    return seen


def expected_launch(kernel: Kernel, variant: Variant, tokens: int) -> tuple[HostModule, int, int]:
    generated = variant.generated
    segments, tiles = generated.lowered.segments, variant.range.token_tiles
    launch = generated.schedule.launch(segments, tokens, kernel.spec.heads, token_tiles=tiles)
    return variant.module(), launch.grid, generated.schedule.threads


def assert_served(kernel: Kernel, launches: list, served: Sequence[tuple[int, int]]) -> None:
    """Calls of (number of tokens) are right, and served by the variant of (number)."""
    for tokens, number in served:
        launches.clear()
        check(kernel, Workload(tokens), seed=tokens)
        assert launches == [expected_launch(kernel, kernel.variants[number], tokens)], tokens


def test_the_number_of_tokens_chooses(launches):
    kernel = load(SPEC, "cpu", arch="sm_90")
    assert tuple(each.range for each in kernel.variants) == RANGES
    assert kernel.generated is kernel.variants[0].generated
    served = [(1, 0), (8, 0), (9, 1), (24, 1), (25, 2), (40, 2), (41, 3), (100, 3)]
    assert_served(kernel, launches, [*served, *reversed(served)])  # at the second time every plan is there


def test_ranges_with_one_layout_share_a_kernel_and_differ_in_their_grid():
    kernel = load(SPEC, "cpu", arch="sm_90")
    first, second = kernel.variants[1:3]
    assert first.generated is second.generated
    (module, grid, threads), other = (expected_launch(kernel, each, 32) for each in (first, second))
    assert other == (module, grid - SPEC.heads, threads), "one workgroup for a head's four token tiles, not two"


def test_no_tokens_run_nothing(launches):
    check(load(SPEC, "cpu", arch="sm_90"), Workload(0))
    assert launches == []


def test_the_host_run_compiles_what_is_asked_for(monkeypatch):
    """The first kernel when it is loaded, each of the others with the first call that needs it."""
    made = []
    library = runtime.host_library
    monkeypatch.setattr(runtime, "host_library", lambda spec, generated: made.append(generated.name) or library(spec, generated))
    kernel = load(SPEC, "cpu", arch="sm_90")
    assert made == [kernel.generated.name]
    for tokens in (41, 30, 10, 3, 41):
        check(kernel, Workload(tokens))
    assert [name.rpartition("sm_90")[2] for name in made] == ["", "_w4_b32", "_w4_b16"]


def test_a_number_of_heads_that_no_entry_has_takes_the_nearest(launches):
    kernel = load(small_spec(lora_rank=128, nope_dim=32, heads=7), "cpu", arch="sm_90")
    assert_served(kernel, launches, [(8, 0), (9, 1), (41, 3)])


# Weights in codes


@pytest.mark.parametrize("weight", ["fp8", "fp8-block", "mxfp4"])
def test_all_kernels_read_the_same_packed_weights(table, weight):
    """Two tiles of columns for each wave, as an entry says; with and without data an operator's packed head is as large."""
    block = None if weight == "fp8-block" else 16
    ranges = (Range(8, Layout(m_tiles=2)), Range(None, Layout(4, block, False, 2)))
    table.write_text(write_table("sm_90", "a test", [Entry(32, 128, 3, False, ranges, weight_bits=4 if weight == "mxfp4" else 8)]))
    spec = small_spec(lora_rank=128, nope_dim=32, weight=weight)
    kernel, dependent = (load(spec, "cpu", arch="sm_90", pdl=pdl) for pdl in (False, True))
    assert [each.range for each in kernel.variants] == list(ranges)
    for tokens in (3, 20):
        check(kernel, Workload(tokens))
        check(dependent, Workload(tokens))
    w_uk = torch.randn(3, 32, 128).bfloat16()
    packed = kernel.pack_weights(w_uk)
    assert torch.equal(packed, dependent.pack_weights(w_uk))
    with FakeTensorMode() as mode:
        fake = torch.ops.mlagen.pack_weights(mode.from_tensor(w_uk), spec=ops.spec_to_str(spec), arch="sm_90")
    assert fake.shape == packed.shape


# Dependent launch


def test_dependent_kernels_are_loaded_beside_the_others(launches):
    plain, dependent = (load(SPEC, "cpu", arch="sm_90", pdl=pdl) for pdl in (False, True))
    assert load(SPEC, "cpu", arch="sm_90", pdl=True) is dependent is not plain
    assert load(SPEC, "cpu", arch="sm_90") is plain
    assert tuple(each.range for each in dependent.variants) == DEPENDENT
    assert [each.generated.dependent for each in (*plain.variants, *dependent.variants)] == [False] * 4 + [True] * 2
    assert [each.generated.name.rpartition("sm_90")[2] for each in dependent.variants] == ["_pdl", "_w4_b16_pdl"]
    assert_served(dependent, launches, [(1, 0), (16, 0), (17, 1), (50, 1)])


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("changes", [{}, {"weight": "none"}], ids=["absorb", "absorbed"])
def test_a_target_without_dependent_launch_says_so(arch, changes):
    for _ in range(2):
        with pytest.raises(ScheduleError, match=f"^{arch} starts no kernel before the one before it has ended: leave pdl out$"):
            load(small_spec(**changes), "cpu", arch=arch, pdl=True)
    load(small_spec(**changes), "cpu", arch=arch, pdl=False)


def test_a_table_that_cannot_be_read_is_named(table):
    table.write_text("{}")
    for pdl in (False, True):
        with pytest.raises(RequestError, match=rf"^{table}: not a table .*`mlagen tune`$"):
            load(small_spec(lora_rank=128, heads=9), "cpu", arch="sm_90", pdl=pdl)
