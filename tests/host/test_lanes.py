"""The host library by itself: lanes meet at barriers and wave operations as on the hardware; where they would not, it says so."""

import functools
import struct

import pytest
import torch

from mlagen import rendering, toolchain
from mlagen.drivers.host import HostModule
from mlagen.drivers.parameters import Parameters
from mlagen.errors import MlagenError
from mlagen.target import find_target

pytestmark = pytest.mark.host

WAVE = 64

# Every kernel writes one word for each lane; `input` is one word that all of them see.
SKELETON = """
constexpr uint32_t THREADS = {threads};

MLAGEN_KERNEL(THREADS) void kernel(uint32_t* out, uint32_t input)
{{
    const uint32_t thread = thread_id(), lane = thread % {wave};
    uint32_t& result = out[workgroup_id() * THREADS + thread];
    {body}
}}

static void run_lane(void** parameters)
{{
    kernel(*static_cast<uint32_t**>(parameters[0]), *static_cast<uint32_t*>(parameters[1]));
}}

extern "C" int mlagen_host_launch(uint32_t grid, void** parameters, uint32_t cpu_threads, char* error, size_t error_size)
{{
    return host::launch<run_lane, {wave}, THREADS>(grid, parameters, cpu_threads, error, error_size);
}}
"""


@functools.cache
def module(body: str, waves: int) -> HostModule:
    everything = {"target": find_target("gfx942"), "staging": True, "dependent": True}
    library = [rendering.environment().get_template(f"lib/{name}").render(everything) for name in ("host.h", "host_launch.h")]
    source = "\n".join([*library, SKELETON.format(body=body, threads=waves * WAVE, wave=WAVE)])
    return HostModule(toolchain.compile_host(source, name="lanes"))


def run(body: str, waves: int, *, grid: int = 1, value: int = 0, cpu_threads: int | None = None) -> torch.Tensor:
    """What each lane wrote: [workgroup, thread]."""
    out = torch.full((grid, waves * WAVE), -1, dtype=torch.int32)
    loaded = module(body, waves)
    loaded.cpu_threads = cpu_threads or 2
    parameters = Parameters(struct.pack("Qq", out.data_ptr(), value), (0, 1))
    loaded.launch(grid, waves * WAVE, parameters.address)
    return out.long()


def grid_of(waves: int, grid: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Workgroup and thread numbers, to compute with what a lane should have written."""
    return torch.arange(grid)[:, None].expand(grid, waves * WAVE), torch.arange(waves * WAVE).expand(grid, waves * WAVE)


@pytest.mark.parametrize("waves", [1, 3])
@pytest.mark.parametrize("grid", [1, 2, 7, 100])
def test_each_lane_of_each_workgroup_runs_once(grid, waves):
    workgroup, thread = grid_of(waves, grid)
    written = run("result = result + 1 + workgroup_id() * 1000 + thread + input;", waves, grid=grid, value=5)
    assert torch.equal(written, workgroup * 1000 + thread + 5)


def test_an_empty_grid_runs_nothing():
    assert run("result = 1;", 1, grid=0).numel() == 0


# Each round reads what another wave wrote in this round, and writes where another wave has just read.
ROUNDS = """
    MLAGEN_SHARED uint32_t shared[THREADS];
    result = 0;
    for (uint32_t round = 0; round < 5; ++round) {
        shared[thread] = 1000 * workgroup_id() + 10 * thread + round;
        barrier();
        result += shared[THREADS - 1 - thread];
        barrier();
    }
"""


@pytest.mark.parametrize("cpu_threads", [1, 2, 4])
@pytest.mark.parametrize("waves", [1, 2, 4])
def test_shared_memory_and_barriers(waves, cpu_threads):
    """Workgroups that run at the same time do not share it."""
    workgroup, thread = grid_of(waves, 50)
    written = run(ROUNDS, waves, grid=50, cpu_threads=cpu_threads)
    assert torch.equal(written, 5 * (1000 * workgroup + 10 * (waves * WAVE - 1 - thread)) + 10)


# As ROUNDS, among the lanes of a group of two waves; the groups do not go through as many rounds.
GROUP_ROUNDS = """
    uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
    const uint32_t group = thread / 128, first = group * 128;
    result = 0;
    for (uint32_t round = 0; round < 5 + group; ++round) {
        shared[thread] = 1000 * workgroup_id() + 10 * thread + round;
        group_barrier(group, 128);
        result += shared[first + 127 - thread % 128];
        group_barrier(group, 128);
    }
    publish_shared();
    result += shared[THREADS - 1 - thread];
"""


@pytest.mark.parametrize("cpu_threads", [1, 4])
@pytest.mark.parametrize("waves", [2, 4, 6])
def test_groups_of_waves_meet_by_themselves(waves, cpu_threads):
    workgroup, thread = grid_of(waves, 20)
    written = run(GROUP_ROUNDS, waves, grid=20, cpu_threads=cpu_threads)
    group = thread // 128
    rounds, partner = 5 + group, 1000 * workgroup + 10 * (group * 128 + 127 - thread % 128)
    last = waves * WAVE - 1 - thread
    expected = rounds * partner + rounds * (rounds - 1) // 2 + 1000 * workgroup + 10 * last + 4 + last // 128
    assert torch.equal(written, expected)


@pytest.mark.parametrize(("distance", "waves"), [(1, 1), (1, 3), (33, 2), (64, 2), (127, 2)])
def test_shuffle_stays_within_the_wave(distance, waves):
    """The hardware takes the source lane modulo 64."""
    _, thread = grid_of(waves)
    written = run("result = shuffle(7 * thread, lane + input);", waves, value=distance)
    assert torch.equal(written, 7 * (thread // WAVE * WAVE + (thread + distance) % WAVE))


def test_uniform_takes_the_first_lane_of_the_wave():
    _, thread = grid_of(3)
    assert torch.equal(run("result = uniform(5 * thread + 1);", 3), 5 * (thread // WAVE * WAVE) + 1)


# A sum over the workgroup: shuffles within each wave, shared memory between the waves, one uniform value for all.
REDUCTION = """
    MLAGEN_SHARED uint32_t sums[THREADS / 64];
    uint32_t sum = thread + input;
    for (uint32_t distance = 32; distance; distance /= 2) sum += shuffle(sum, lane ^ distance);
    if (lane == 0) sums[thread / 64] = sum;
    barrier();
    uint32_t total = 0;
    for (uint32_t wave = 0; wave < THREADS / 64; ++wave) total += sums[wave];
    result = uniform(total) + thread;
"""


@pytest.mark.parametrize("waves", [1, 2, 8])
def test_a_sum_over_the_workgroup(waves):
    _, thread = grid_of(waves, 3)
    written = run(REDUCTION, waves, grid=3, value=3)
    assert torch.equal(written, (thread[:1] + 3).sum() + thread)


def test_a_lane_keeps_its_variables_while_it_waits():
    body = """
    volatile uint32_t kept[64];
    for (uint32_t i = 0; i < 64; ++i) kept[i] = thread * 64 + i;
    for (uint32_t i = 0; i < 64; ++i) { barrier(); kept[i] += shuffle(i, lane + i); }
    result = 0;
    for (uint32_t i = 0; i < 64; ++i) result += kept[i];
"""
    _, thread = grid_of(2)
    assert torch.equal(run(body, 2), 64 * 64 * thread + 2 * (63 * 64 // 2))


def test_a_wave_may_end_before_the_others_meet():
    """As on the hardware: a barrier waits for the waves that are still there."""
    _, thread = grid_of(3)
    written = run("result = 1; if (thread / 64 == 1) return; barrier(); result = 2;", 3)
    assert torch.equal(written, torch.where(thread // WAVE == 1, 1, 2))


def test_waves_may_do_different_things_between_barriers():
    body = "result = thread / 64 ? shuffle(thread, lane ^ 1) : uniform(thread + 9); barrier();"
    _, thread = grid_of(2)
    assert torch.equal(run(body, 2), torch.where(thread < WAVE, 9, thread ^ 1))


DIVERGENT = {
    "some lanes only": "if (lane < input) result = shuffle(thread, 0);",
    "one lane left": "if (lane == 63 && input) return; result = uniform(thread);",
    "different operations": "if (lane < input) result = shuffle(thread, 0); else result = uniform(thread);",
    "some at a barrier": "if (lane < input) barrier(); else result = uniform(thread);",
    "in the last round": "for (uint32_t i = 0; i < 9; ++i) if (i < 8 || lane >= input) result = shuffle(i, 0);",
    "in one wave of several": "if (thread < 64 || lane >= input) result = uniform(thread);",
    "some at a group barrier": "if (lane < input) group_barrier(0, 128); else barrier();",
    "one wave of a group": "if (thread < 64 || !input) group_barrier(0, 128); barrier();",
    "groups of different sizes": "group_barrier(0, thread < 64 && input ? 64 : 128); barrier();",
}


@pytest.mark.parametrize("cpu_threads", [1, 3])
@pytest.mark.parametrize("body", DIVERGENT.values(), ids=[name.replace(" ", "-") for name in DIVERGENT])
def test_lanes_that_do_not_meet_are_an_error(body, cpu_threads):
    """One line, not a hang and not a guess; the module can be used again."""
    with pytest.raises(MlagenError, match=r"^host run: .*lanes.*$") as caught:
        run(body, 2, grid=20, value=32, cpu_threads=cpu_threads)
    assert "\n" not in str(caught.value)
    run(body, 2, grid=20, value=0, cpu_threads=cpu_threads)  # with 0 all lanes do the same
