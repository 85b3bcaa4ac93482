"""The floor's kernels: they compile for every target, and on the CPU they read everything once and write everything once."""

import re
import types

import pytest
import torch

from mlagen import cuda_toolchain, toolchain
from mlagen.codegen import FLOOR_THREADS, floor_arguments, floor_source
from mlagen.drivers.host import HostModule
from mlagen.errors import ToolchainError
from mlagen.machine_code import read_resources, refuse_spills
from mlagen.plan import fixed_parameters
from mlagen.rendering import environment, template_texts
from mlagen.target import TARGETS
from mlagen.timing.floor import PIECE_BYTES

STREAMS = [f"mlagen_stream_{threads}" for threads in FLOOR_THREADS]


@pytest.mark.compiler
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_it_compiles_for_amd(arch):
    built = toolchain.compile_device(floor_source(TARGETS[arch]), arch, name="floor")
    assert built.warnings == ""
    for kernel in ("mlagen_empty", *STREAMS):
        refuse_spills(read_resources(built.assembly, kernel), kernel)


@pytest.mark.compiler
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("kernel", STREAMS)
def test_every_load_is_asked_for_before_the_first_is_waited_for(arch, kernel):
    assembly = toolchain.compile_device(floor_source(TARGETS[arch]), arch, name="floor").assembly
    body = re.search(rf"^{kernel}:.*?s_endpgm", assembly, re.MULTILINE | re.DOTALL).group()
    memory = re.findall(r"global_load_dwordx4|s_waitcnt vmcnt", body)
    assert memory[:5] == ["global_load_dwordx4"] * 4 + ["s_waitcnt vmcnt"]


def test_it_compiles_for_nvidia():
    try:
        built = cuda_toolchain.compile_device(floor_source(TARGETS["sm_90"]), "sm_90", name="floor")
    except ToolchainError:
        pytest.skip("NVRTC")
    assert built.warnings == ""
    assert all(kernel.encode() in built.binary for kernel in ("mlagen_empty", *STREAMS))


# On the CPU

THREADS = FLOOR_THREADS[0]


@pytest.fixture(scope="module")
def stream() -> HostModule:
    """mlagen_stream_128 for the CPU."""
    arguments = floor_arguments()
    entry = environment().get_template("host_entry.cpp.j2")
    text = "\n".join(
        (
            floor_source(TARGETS["sm_90"], "host"),
            template_texts()["lib/host_launch.h"],
            entry.render(
                kernel=f"mlagen_stream_{THREADS}",
                arguments=[{"cpp": argument.cpp} for argument in arguments],
                schedule=types.SimpleNamespace(wave=32, threads=THREADS),
            ),
        )
    )
    return HostModule(toolchain.compile_host(text, name="floor"))


def run(stream: HostModule, inputs: list[torch.Tensor], outputs: list[torch.Tensor], workgroups: int) -> None:
    places = [value for tensor in (*inputs, *outputs) for value in (tensor.data_ptr(), tensor.nbytes // PIECE_BYTES)]
    parameters = fixed_parameters(floor_arguments(), [*places, workgroups])
    stream.launch(workgroups, THREADS, parameters.address)


@pytest.mark.host
@pytest.mark.parametrize("workgroups", [1, 2, 3])
def test_every_word_is_read_and_every_piece_written(stream, workgroups):
    """Every lane writes what its words sum to: a word that one lane reads changes what this lane writes."""
    torch.manual_seed(0)
    inputs = [torch.randint(1 << 20, (4 * pieces,), dtype=torch.int32) for pieces in (301, 64, 5, 1)]
    guarded = [torch.full((4 * (pieces + 2),), -1, dtype=torch.int32) for pieces in (380, 6)]
    outputs = [buffer[4:-4] for buffer in guarded]

    def written() -> torch.Tensor:
        run(stream, inputs, outputs, workgroups)
        return torch.cat([output.clone() for output in outputs])

    before = written()
    assert all(bool((buffer[:4] == -1).all() and (buffer[-4:] == -1).all()) for buffer in guarded)
    assert bool((before != -1).all())
    for tensor in inputs:
        for word in (0, 1, 2, 3, tensor.numel() // 2, tensor.numel() - 1):
            tensor[word] += 1
            assert not torch.equal(written(), before)
            tensor[word] -= 1
    assert torch.equal(written(), before)


@pytest.mark.host
def test_tensors_that_are_not_there(stream):
    """No W_UK, no k_pe; and less to read and to write than there are lanes, so that each reads the last piece three times more."""
    empty = torch.empty(0, dtype=torch.int32)
    inputs = [empty, torch.ones(4 * 40, dtype=torch.int32), torch.ones(4, dtype=torch.int32), empty]
    outputs = [torch.full((4,), -1, dtype=torch.int32), torch.full((4,), -1, dtype=torch.int32)]
    run(stream, inputs, outputs, 2)
    assert [output.tolist() for output in outputs] == [[16] * 4, [16] * 4]
