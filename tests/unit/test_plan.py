"""What reaches a module's launch: the grid, and a list of pointers to the right values, whoever else launches meanwhile."""

import ctypes
import struct
import threading
import time
from dataclasses import replace

import pytest
import torch
from helpers import single_kernel

from mlagen import plan as plans
from mlagen import runtime
from mlagen.codegen import generate
from mlagen.errors import ArgumentError, MlagenError
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS

SPEC = PrologueSpec(heads=2, nope_dim=32, lora_rank=64, rope_dim=16, rope_style="gptj")
FORMATS = {"pointer": ("<Q", 8), "int32": ("<i", 4), "int64": ("<q", 8), "uint64": ("<Q", 8)}


class RecordingModule:
    """Reads its arguments as a runtime does, some time after it was called."""

    def __init__(self, generated, seconds=0.0):
        self.arguments, self.seconds = generated.arguments, seconds
        self.launches = []

    def parameters(self, address):
        return address

    def launch(self, grid, block, parameters, shared_bytes=0):
        time.sleep(self.seconds)
        pointers = (ctypes.c_void_p * len(self.arguments)).from_address(parameters)
        values = {"grid": grid, "block": block}
        for argument, pointer in zip(self.arguments, pointers, strict=True):
            form, size = FORMATS[argument.kind]
            (values[argument.name],) = struct.unpack(form, ctypes.string_at(pointer, size))
        self.launches.append(values)


def make_kernel(arch="gfx950", spec=SPEC, seconds=0.0):
    """A kernel, the module that it launches, and the one for rows that are not aligned, where there are two."""
    target = TARGETS[arch]
    generated = generate(spec, target)
    modules = [RecordingModule(generated, seconds) for _ in range(2)]
    load_unaligned = None if target.unaligned_access else lambda: modules[1]
    return single_kernel(spec, generated, modules[0], load_unaligned), *modules


def make_call(kernel, tokens=3, *, blocks=8, slots=None, **changes):
    spec, fp8 = kernel.spec, torch.float8_e4m3fn
    call = {
        "q": torch.zeros(tokens, spec.heads, 48, dtype=torch.bfloat16),
        "kv_c": torch.zeros(tokens, 64, dtype=torch.bfloat16),
        "k_pe": torch.zeros(tokens, 16, dtype=torch.bfloat16),
        "packed": kernel.pack_weights(torch.zeros(spec.heads, 32, spec.lora_rank, dtype=torch.bfloat16)),
        "kv_cache": torch.zeros(blocks, 16, 80, dtype=fp8),
        "slot_mapping": torch.arange(slots or tokens),
        "positions": torch.arange(tokens, dtype=torch.int32),
        "cos_sin_cache": torch.zeros(100, 16),
        "q_scale": torch.ones(()),
        "k_scale": torch.ones(1),
        "out": torch.zeros(tokens, spec.heads, 80, dtype=fp8),
    }
    return {**call, **changes}


def expected(call):
    """What the module must find for a call with one q and one table."""
    q, table, out, cache = (call[name] for name in ("q", "cos_sin_cache", "out", "kv_cache"))
    values = {
        name: call[name].data_ptr() for name in ("kv_c", "k_pe", "kv_cache", "slot_mapping", "positions", "q_scale", "k_scale")
    }
    return values | {
        "w_uk": call["packed"].data_ptr(),
        "q_nope": q.data_ptr(),
        "q_pe": q.data_ptr() + 2 * 32,
        "cos": table.data_ptr(),
        "sin": table.data_ptr() + 4 * 8,
        "q_out": out.data_ptr(),
        "tokens": q.shape[0],
        "heads": 2,
        "positions_int64": 0,
        "slots_int64": 1,
        "cos_sin_float": 1,
        "max_position": 100,
        "block_size": 16,
        "block_stride": cache.stride(0),
        "entry_stride": cache.stride(1),
        "q_pe_head_stride": q.stride(1),
        "kv_c_token_stride": call["kv_c"].stride(0),
        "q_out_token_stride": out.stride(0),
    }


def assert_launched(launch, call):
    assert {name: launch[name] for name in expected(call)} == expected(call)


@pytest.mark.parametrize("arch", TARGETS)
def test_each_argument_finds_its_value(arch):
    kernel, module, _ = make_kernel(arch)
    fp8 = torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn
    for tokens in (3, 1, 40, 3):
        call = make_call(kernel, tokens)
        call["out"], call["kv_cache"] = call["out"].view(fp8), call["kv_cache"].view(fp8)
        kernel(**call)
        assert_launched(module.launches[-1], call)
        workgroups = kernel.generated.schedule.launch(kernel.generated.lowered.segments, tokens, 2)
        assert module.launches[-1]["grid"] == workgroups.grid
        assert module.launches[-1]["block"] == kernel.generated.schedule.threads


@pytest.fixture
def checks(monkeypatch):
    """The calls whose arguments were checked from now on."""
    found, bind = [], runtime.bind
    monkeypatch.setattr(runtime, "bind", lambda *arguments, **options: found.append(arguments) or bind(*arguments, **options))
    return found


def test_what_is_recognised_is_not_checked_again(checks):
    kernel, module, _ = make_kernel()
    for tokens in (3, 5, 5, 3, 3, 5):
        call = make_call(kernel, tokens)
        kernel(**call)
        assert_launched(module.launches[-1], call)
    assert len(checks) == 2


def test_calls_that_differ_in_one_extent_or_stride_have_plans_of_their_own(checks):
    """One for each number of slots; for the same numbers of tokens and slots some, of which the oldest go."""
    kernel, module, _ = make_kernel()

    def checked(*variants):
        """How many of these calls were checked."""
        before = len(checks)
        for variant in variants:
            call = make_call(kernel, 3, **variant)
            kernel(**call)
            assert_launched(module.launches[-1], call)
        return len(checks) - before

    blocks = [{"blocks": blocks} for blocks in range(1, 1 + plans.MAX_ALIKE)]
    slots = [{"slots": slots} for slots in range(4, 50)]
    assert checked(*blocks, *slots) == len(blocks) + len(slots)
    assert checked(*slots, *blocks) == 0
    assert checked({"blocks": 100}) == 1
    assert checked(*blocks[1:], *slots) == 0
    assert checked(blocks[0]) == 1


def test_plans_start_over_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(plans, "MAX_PLANS", 4)
    kernel, module, _ = make_kernel()
    for tokens in (*range(1, 20), *range(1, 20)):
        call = make_call(kernel, tokens)
        kernel(**call)
        assert_launched(module.launches[-1], call)
    (form,) = (form for form in kernel._forms.values() if form.recent)
    assert len(form._plans) <= 4


def test_threads_do_not_see_each_others_arguments():
    """Eight threads, all within a launch at once, each with its own number of tokens, twice with the same."""
    kernel, module, _ = make_kernel(seconds=0.002)
    calls = [make_call(kernel, tokens) for tokens in (1, 1, 2, 3, 5, 8, 40, 40) for _ in range(5)]
    together = threading.Barrier(8, timeout=60)

    def work(number):
        together.wait()
        for call in calls[5 * number : 5 * number + 5]:
            kernel(**call)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launches = {launch["q_nope"]: launch for launch in module.launches}
    assert len(launches) == len(calls)
    for call in calls:
        assert_launched(launches[call["q"].data_ptr()], call)


class TestParts:
    """Kernels that leave the query or the cache out: what they do not read is not looked at, and their plans do without it."""

    @pytest.mark.parametrize(
        ("left_out", "unread"),
        [("write_q", ("q", "q_scale")), ("write_kv", ("kv_c", "k_pe", "kv_cache", "slot_mapping", "k_scale"))],
    )
    def test_each_argument_finds_its_value(self, left_out, unread):
        kernel, module, _ = make_kernel(spec=replace(SPEC, **{left_out: False}))
        missing = (*unread, *(("packed", "out") if left_out == "write_q" else ()))
        for tokens, value in ((3, None), (1, "anything"), (40, None), (3, None)):
            call = make_call(make_kernel()[0], tokens)
            given = {**call, **dict.fromkeys(unread, value), **dict.fromkeys(set(missing) - set(unread))}
            assert kernel(**given) is given["out"]
            wanted = {name: each for name, each in expected(call).items() if name in module.launches[-1]}
            assert {name: module.launches[-1][name] for name in wanted} == wanted
            assert "w_uk" in wanted or "kv_cache" in wanted

    @pytest.mark.parametrize("left_out", ["write_q", "write_kv"])
    def test_a_call_like_an_earlier_one_is_not_checked_again(self, left_out, checks):
        kernel, module, _ = make_kernel(spec=replace(SPEC, **{left_out: False}))
        for tokens in (3, 3, 8, 3, 8):
            call = make_call(make_kernel()[0], tokens)
            kernel(**({**call, "packed": None, "out": None} if left_out == "write_q" else call))
        assert len(checks) == 2
        assert len(module.launches) == 5


def shifted(tensor, elements=1):
    """The same tensor, not aligned."""
    return torch.zeros(tensor.numel() + elements, dtype=tensor.dtype)[elements:].view(tensor.shape)


class TestScales:
    """Kernels that return scales: both results find their place, and the call has no q_scale."""

    @staticmethod
    def call(tokens=3, more=0):
        call = make_call(make_kernel()[0], tokens)
        return {**call, "q_scale": None, "out": (call["out"], torch.zeros(tokens, 2 + more)[:, :2])}

    def test_each_argument_finds_its_value(self, checks):
        kernel, module, _ = make_kernel(spec=replace(SPEC, q_scaling="token"))
        for tokens, more in ((3, 0), (3, 0), (3, 5), (8, 0), (3, 5), (3, 0)):
            call = self.call(tokens, more)
            made = kernel(**call)
            assert all(mine is theirs for mine, theirs in zip(made, call["out"], strict=True))
            launch, (q_out, scales) = module.launches[-1], call["out"]
            assert (launch["q_out"], launch["q_scales"]) == (q_out.data_ptr(), scales.data_ptr())
            assert (launch["q_out_token_stride"], launch["q_scales_token_stride"]) == (q_out.stride(0), scales.stride(0))
            assert "q_scale" not in launch
        assert len(checks) == 3

    @pytest.mark.parametrize("warm", [False, True])
    def test_a_scale_is_refused_every_time(self, warm):
        kernel, module, _ = make_kernel(spec=replace(SPEC, q_scaling="token"))
        if warm:
            kernel(**self.call())
        for _ in range(2):
            with pytest.raises(ArgumentError, match="q_scale: this kernel computes"):
                kernel(**{**self.call(), "q_scale": torch.ones(())})
        assert len(module.launches) == int(warm)

    def test_scales_may_start_anywhere(self):
        """They are written one by one."""
        kernel, aligned, other = make_kernel("sm_90", replace(SPEC, q_scaling="token"))
        call = {**make_call(kernel), **{name: self.call()[name] for name in ("q_scale", "out")}}
        kernel(**{**call, "out": (call["out"][0], shifted(call["out"][1]))})
        assert (len(aligned.launches), len(other.launches)) == (1, 0)


class TestAlignment:
    """On a target without unaligned access: what starts off 16 bytes goes to the other kernel, and only that."""

    @pytest.mark.parametrize("name", ["q", "kv_c", "k_pe", "kv_cache", "cos_sin_cache", "out"])
    def test_addresses(self, name):
        kernel, aligned, other = make_kernel("sm_90")
        for offset in (0, 1, 0, 1, 1, 16, 0):
            call = make_call(kernel)
            call[name] = shifted(call[name], offset)
            launches = len(aligned.launches), len(other.launches)
            kernel(**call)
            moved = len(aligned.launches) - launches[0], len(other.launches) - launches[1]
            assert moved == ((0, 1) if offset == 1 else (1, 0))
            assert_launched((other if offset == 1 else aligned).launches[-1], call)

    def test_strides(self):
        """Aligned at its start, but not from row to row."""
        kernel, aligned, other = make_kernel("sm_90")
        for gap, launched in ((1, other), (8, aligned), (1, other)):
            call = make_call(kernel, kv_c=torch.zeros(3, 64 + gap, dtype=torch.bfloat16)[:, :64])
            kernel(**call)
            assert_launched(launched.launches[-1], call)
        assert (len(aligned.launches), len(other.launches)) == (1, 2)

    @pytest.mark.parametrize(
        ("nope_first", "q_dtype", "kv_dtype", "is_aligned"),
        [
            (True, "fp8", "fp8", True),
            (False, "fp8", "fp8", False),
            (False, "fp8", "bf16", False),
            (False, "bf16", "fp8", False),
            (False, "bf16", "bf16", True),
        ],
    )
    def test_where_the_second_part_of_a_written_row_starts(self, nope_first, q_dtype, kv_dtype, is_aligned):
        """Rows of 72 elements, 80 apart: [64 | 8] is aligned, [8 | 64] only where the elements have two bytes."""
        types = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}
        spec = replace(SPEC, rope_dim=8, nope_first=nope_first, q_dtype=q_dtype, kv_dtype=kv_dtype)
        kernel, aligned, other = make_kernel("sm_90", spec)
        call = make_call(
            kernel,
            q=torch.zeros(3, spec.heads, 40, dtype=torch.bfloat16),
            k_pe=torch.zeros(3, 8, dtype=torch.bfloat16),
            kv_cache=torch.zeros(8, 16, 80, dtype=types[kv_dtype])[..., :72],
            cos_sin_cache=torch.zeros(100, 8),
            out=torch.zeros(3, spec.heads, 80, dtype=types[q_dtype])[..., :72],
        )
        kernel(**call)
        assert (len(aligned.launches), len(other.launches)) == ((1, 0) if is_aligned else (0, 1))

    @pytest.mark.parametrize(("rope_dim", "kv_dtype", "is_aligned"), [(16, "fp8", True), (8, "fp8", False), (8, "bf16", True)])
    def test_where_the_rotary_columns_of_a_segmented_block_lie(self, rope_dim, kv_dtype, is_aligned):
        """A block of 16 slots is aligned; from slot to slot it is R elements."""
        types = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}
        spec = replace(SPEC, rope_dim=rope_dim, kv_dtype=kv_dtype, kv_layout="segmented")
        kernel, aligned, other = make_kernel("sm_90", spec)
        call = make_call(
            kernel,
            q=torch.zeros(3, spec.heads, 32 + rope_dim, dtype=torch.bfloat16),
            k_pe=torch.zeros(3, rope_dim, dtype=torch.bfloat16),
            kv_cache=torch.zeros(8, 16 * (64 + rope_dim), dtype=types[kv_dtype]),
            cos_sin_cache=torch.zeros(100, 16)[:, :rope_dim],
            out=torch.zeros(3, spec.heads, 80, dtype=torch.float8_e4m3fn)[..., : 64 + rope_dim],
        )
        kernel(**call)
        assert (len(aligned.launches), len(other.launches)) == ((1, 0) if is_aligned else (0, 1))

    @pytest.mark.parametrize(("lora_rank", "entry", "is_aligned"), [(512, 656, True), (512, 664, False), (128, 160, False)])
    def test_where_the_rotary_values_of_an_fp8_ds_mla_entry_lie(self, lora_rank, entry, is_aligned):
        """At byte 528 of 656, a multiple of 16; of narrower latents at byte 132."""
        spec = replace(SPEC, lora_rank=lora_rank, rope_dim=64 if lora_rank == 512 else 8, kv_layout="fp8_ds_mla")
        kernel, aligned, other = make_kernel("sm_90", spec)
        width = lora_rank + lora_rank // 32 + 2 * spec.rope_dim
        call = make_call(
            kernel,
            q=torch.zeros(3, spec.heads, 32 + spec.rope_dim, dtype=torch.bfloat16),
            kv_c=torch.zeros(3, lora_rank, dtype=torch.bfloat16),
            k_pe=torch.zeros(3, spec.rope_dim, dtype=torch.bfloat16),
            kv_cache=torch.zeros(8, 16, entry, dtype=torch.uint8)[..., :width],
            cos_sin_cache=torch.zeros(100, 64)[:, : spec.rope_dim],
            out=torch.zeros(3, spec.heads, 640, dtype=torch.float8_e4m3fn)[..., : spec.entry_dim],
        )
        kernel(**call)
        assert (len(aligned.launches), len(other.launches)) == ((1, 0) if is_aligned else (0, 1))

    @pytest.mark.parametrize("name", ["slot_mapping", "positions", "q_scale", "k_scale"])
    def test_what_is_read_one_by_one_may_start_anywhere(self, name):
        kernel, aligned, _ = make_kernel("sm_90")
        call = make_call(kernel)
        call[name] = shifted(call[name])
        kernel(**call)
        assert len(aligned.launches) == 1

    @pytest.mark.parametrize("arch", ["gfx950", "sm_90"])
    def test_packed_weights_must_be(self, arch):
        kernel, aligned, other = make_kernel(arch)
        for _ in range(2):
            call = make_call(kernel)
            kernel(**call)
            for changes in ({}, {"kv_c": shifted(call["kv_c"])}):
                with pytest.raises(ArgumentError, match=r"^packed: starts off a multiple of 16 bytes"):
                    kernel(**{**call, "packed": shifted(call["packed"]), **changes})
        assert (len(aligned.launches), len(other.launches)) == (2, 0)

    def test_a_target_with_unaligned_access_does_not_care(self):
        kernel, module, _ = make_kernel("gfx950")
        call = make_call(kernel)
        call["kv_c"] = shifted(call["kv_c"])
        kernel(**call)
        assert_launched(module.launches[-1], call)


def test_nothing_is_loaded_in_the_middle_of_a_capture(monkeypatch):
    """Rows that are not aligned need another kernel than the one that load() loaded."""
    target = TARGETS["sm_90"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(runtime, "device_binary", None)
    with pytest.raises(MlagenError, match="before the capture"):
        runtime._load_module(SPEC, target, torch.device("cuda", 0), None, generate(SPEC, target, aligned=False))
