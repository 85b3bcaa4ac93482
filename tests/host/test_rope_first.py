"""nope_first=False: the rotary columns before the latent ones in the rows of both outputs, and nothing else that differs."""

import pytest
import torch
from helpers import Launch, Workload, check, failures, make_launch, small_spec
from hypothesis import given
from hypothesis import strategies as st
from sweep import ARCHS

from mlagen import verify
from mlagen.runtime import Kernel, load
from mlagen.spec import PrologueSpec

pytestmark = pytest.mark.host

SPECS = {
    "plain": {},
    "neox": {"rope_style": "neox", "kv_dtype": "bf16"},
    "absorbed": {"weight": "none", "q_dtype": "bf16"},
    "copied": {"rope_style": "none", "rope_dim": 6, "q_dtype": "bf16", "kv_dtype": "bf16"},
    "stepwise": {"rounding": "stepwise", "dtype": "fp16", "rope_dim": 2},
}
WORKLOADS = {
    "plain": Workload(tokens=31, special=True),
    "narrow indices": Workload(
        tokens=17, slots_dtype=torch.int32, positions_dtype=torch.int32, positions="stale", table_dtype="fp32"
    ),
    "bytes, blocks inside": Workload(
        tokens=9, block_size=3, bytes_cache=True, cache="interleaved", out="head major", layout="joined"
    ),
    "no slots": Workload(tokens=5, slots="none", k_pe_rank=3, table="pair", scales="none"),
    "nothing": Workload(tokens=0),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_the_oracle_explains_it(arch, changes):
    kernel = load(small_spec(nope_first=False, **changes), "cpu", arch=arch)
    for seed, workload in enumerate(WORKLOADS.values()):
        check(kernel, workload, seed=seed)


def written(kernel: Kernel, launch: Launch) -> tuple[torch.Tensor, torch.Tensor]:
    """All bytes of the rows of q_out and of the cache that the launch gave."""
    assert not failures(kernel, launch)
    return tuple(guarded.tensor.view(torch.uint8).clone() for guarded in (launch.case.q_out, launch.case.kv_cache))


def swapped(rows: torch.Tensor, spec: PrologueSpec, name: str) -> torch.Tensor:
    """Bytes of rows [latent | rotary] as [rotary | latent]."""
    width = 1 if getattr(spec, name) == "fp8" else 2
    latent, rotary = rows.split([spec.lora_rank * width, spec.rope_dim * width], -1)
    return torch.cat((rotary, latent), -1)


@given(
    changes=st.sampled_from(list(SPECS.values())),
    arch=st.sampled_from(ARCHS),
    tokens=st.integers(0, 40),
    block_size=st.integers(1, 20),
    out=st.sampled_from(["dense", "spare heads", "head major"]),
    cache=st.sampled_from(["dense", "padded", "interleaved"]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_usual_row_with_its_columns_swapped(changes, arch, tokens, block_size, out, cache, seed):
    """Bit for bit, what is left alone included."""
    workload = Workload(tokens=tokens, block_size=block_size, out=out, cache=cache, special=True)
    kernels = [load(small_spec(nope_first=order, **changes), "cpu", arch=arch) for order in (True, False)]
    usual, other = (written(kernel, make_launch(kernel, workload, seed=seed)) for kernel in kernels)
    for name, rows, expected in zip(("q_dtype", "kv_dtype"), other, usual, strict=True):
        assert torch.equal(rows, swapped(expected, kernels[0].spec, name))


def test_the_comparison_looks_at_the_right_columns():
    """The usual kernel's rows are not taken for the others', and the parts have their names."""
    usual, other = (load(small_spec(nope_first=order), "cpu", arch="gfx950") for order in (True, False))
    case = verify.make_case(usual.spec, usual.target, 16)
    verify.run_case(usual, case)
    assert all(part.passed for part in verify.compare_case(usual.spec, usual.target, case))
    parts = {part.name: part for part in verify.compare_case(other.spec, other.target, case)}
    assert not any(part.passed for part in parts.values())
    assert parts["q_out pe"].elements * 96 == parts["q_out nope"].elements * 32
