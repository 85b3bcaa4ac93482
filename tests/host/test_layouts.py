"""Every layout of the absorb on the host: the same bits as the default's, wherever the tokens are cut into blocks."""

from dataclasses import replace

import pytest
import torch
from helpers import Workload, build_kernel, failures, make_launch, output_bytes, small_spec

from mlagen.codegen import generate
from mlagen.errors import ScheduleError
from mlagen.layout import Layout
from mlagen.runtime import Kernel
from mlagen.spec import PrologueSpec
from mlagen.target import find_target

pytestmark = pytest.mark.host

LAYOUTS = {
    "two waves": Layout(2),
    "dependent": Layout(1, None, True),
    "blocks of 16": Layout(4, 16),
    "blocks of 32": Layout(4, 32),
    "two groups": Layout(8, 32),
    "two groups, dependent": Layout(8, 16, True),
}
SPECS = {
    "fp8": small_spec(lora_rank=256, nope_dim=64),
    "padded, bf16": small_spec(lora_rank=256, q_dtype="bf16"),
    "stepwise, fp16": small_spec(lora_rank=256, dtype="fp16", rounding="stepwise", rope_style="neox", fp8_max=224.0),
    "rope first": small_spec(lora_rank=256, nope_dim=64, nope_first=False),
    "rope first, bf16": small_spec(lora_rank=256, rope_dim=6, q_dtype="bf16", nope_first=False),
    "split": small_spec(lora_rank=256, nope_dim=64, q_split=True),
    "fp8 weights": small_spec(lora_rank=256, nope_dim=80, weight="fp8"),
    "fp8-block weights": small_spec(lora_rank=256, nope_dim=64, weight="fp8-block", rounding="stepwise"),
    "mxfp4 weights": small_spec(lora_rank=256, nope_dim=96, weight="mxfp4", q_dtype="bf16"),
    "no rotation": small_spec(lora_rank=256, nope_dim=32, rope_style="none", rope_dim=0),
}


def laid_out(spec: PrologueSpec, layout: Layout, *changes: tuple[str, str]) -> Kernel:
    """With so few multiprocessors a workgroup takes several blocks of tokens, and there are still several splits."""
    generated = generate(spec, find_target("sm_90"), layout)
    schedule = replace(generated.schedule, compute_units=12)
    return build_kernel(spec, "sm_90", replace(generated, schedule=schedule), *changes)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_does_not_change_a_bit(spec, layout):
    default, other = laid_out(spec, Layout()), laid_out(spec, layout)
    for tokens in (0, 1, 8, 31, 33, 65):
        launches = [make_launch(kernel, Workload(tokens=tokens, special=tokens == 31)) for kernel in (default, other)]
        for kernel, launch in zip((default, other), launches, strict=True):
            assert not failures(kernel, launch), tokens
        assert torch.equal(output_bytes(launches[0]), output_bytes(launches[1])), tokens


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"lora_rank": 96}, Layout(4, 32)),  # 3 tiles of 32 columns
        ({"lora_rank": 256}, Layout(6, 32)),
        ({"lora_rank": 256}, Layout(4, 20)),
        ({"lora_rank": 512, "nope_dim": 512}, Layout(16, 32)),  # registers
    ],
)
def test_a_layout_that_does_not_fit_is_refused(changes, layout):
    with pytest.raises(ScheduleError):
        generate(small_spec(**changes), find_target("sm_90"), layout)


@pytest.mark.parametrize("layout", [Layout(4, 32), Layout(1, None, True)])
def test_another_target_refuses(layout):
    with pytest.raises(ScheduleError, match="gfx950"):
        generate(small_spec(lora_rank=256), find_target("gfx950"), layout)


MUTATIONS = {
    "staged rows exchanged": ("row % 8 * 16 + word * 4", "word * 16 + row % 8 * 4"),
    "words in one octet": ("to + word * OCTET", "to + word * 4"),
    "tiles on top of each other": ("row / 8 * STAGED_TILE + octet", "octet"),
    "split forgotten": ("first_token = split * args.token_tiles_per_workgroup * TOKEN_TILE", "first_token = 0"),
    "later fragments forgotten": ("item < tokens * FRAGMENTS; item +=", "item < 0; item +="),
    "query of another head": (" + head * args.q_nope_head_stride;", ";"),
    "one buffer for both": ("first / BLOCK % 2 * (BLOCK * ROW_STRIDE)", "0"),
    "groups share a buffer": ("group * (2 * BLOCK * ROW_STRIDE)", "0"),
    "group barrier dropped": ("        group_barrier(group, GROUP * WAVE);\n", ""),
    "publication dropped": ("    publish_shared();\n", ""),
    "rows past the last written": ("first + row < tokens", "first + row <= tokens"),
    "group's columns forgotten": ("(part * WAVES + group * GROUP) * L_TILE", "part * WAVES * L_TILE"),
    "absorb workgroups not counted": ("workgroup -= args.absorb_workgroups;", ""),
    "first block only": ("multiply_block(w, staged + first / TOKEN_TILE * STAGED_TILE, sums)", "multiply_block(w, staged, sums)"),
}


@pytest.mark.parametrize("change", MUTATIONS.values(), ids=MUTATIONS)
def test_a_defect_of_the_staged_absorb_shows(change):
    narrow = change == MUTATIONS["later fragments forgotten"]  # more fragments than the lanes ask for at once
    spec = small_spec(lora_rank=512, nope_dim=256 if narrow else 64)
    layout = Layout(4 if narrow else 8, 16)
    workload = Workload(tokens=61, special=True)
    sound = laid_out(spec, layout)
    launch = sound.generated.schedule.launch(sound.generated.lowered.segments, 61, spec.heads)
    assert launch.token_tiles_per_workgroup == 4, "two blocks of two tiles, twice"
    assert not failures(sound, make_launch(sound, workload, seed=1)), "red without the mutation"
    wrong = laid_out(spec, layout, change)
    assert failures(wrong, make_launch(wrong, workload, seed=1)), "not seen"
