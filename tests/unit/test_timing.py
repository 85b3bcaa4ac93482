"""How times are taken: in turn, of work that is right, on weights that are cold."""

import dataclasses

import pytest
import torch
from clock import Clock, Replay, constant
from helpers import small_spec

from mlagen.bench.run import OWN, POISON, STREAM, Row, layers_of, measure_methods
from mlagen.errors import MlagenError
from mlagen.peers.eager import EAGER
from mlagen.peers.registry import PEERS
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS
from mlagen.timing import workload as workloads
from mlagen.timing.candidate import Candidate
from mlagen.timing.check import Oracle, explained, nothing, product, rounded
from mlagen.timing.graphs import measure
from mlagen.timing.workload import MAX_LAYERS, cold_layers, make_workload

SM_90 = TARGETS["sm_90"]


@pytest.fixture
def oracle() -> Oracle:
    return Oracle.of(make_workload(small_spec(), SM_90, 5, 2, device="cpu"), 1)


# Clocks


def test_recordings_take_turns_and_medians_count():
    log = []
    first, second = constant(torch.empty(0)), constant(torch.empty(0))
    recordings = {
        "first": Replay(first, 1, [9.0, 1.0, 2.0], log),
        "second": Replay(second, 1, [4.0, 5.0, 60.0], log),
    }
    assert measure(recordings, 3) == {"first": 2.0, "second": 5.0}
    assert log == [first, second] * 3


def test_nothing_to_measure():
    assert measure({}, 3) == {}


# Layers


@pytest.mark.parametrize(
    ("heads", "arch", "weight_bytes", "layers"),
    [
        (128, "sm_90", 2, 61),  # 16 MiB a layer
        (16, "sm_90", 2, 61),
        (16, "sm_90", 1, 120),
        (8, "sm_90", 2, 120),
        (16, "gfx942", 2, 256),  # the Infinity Cache is larger
        (1, "gfx950", 2, MAX_LAYERS),
        (16, "sm_90", 0.5, 240),  # codes of 4 bits
        (3, "sm_90", 0.5, MAX_LAYERS),
    ],
)
def test_layers_are_added_until_their_weights_leave_the_cache(heads, arch, weight_bytes, layers):
    spec = PrologueSpec(heads=heads, nope_dim=128, lora_rank=512, rope_dim=64, rope_style="gptj")
    assert cold_layers(spec, TARGETS[arch], 61, weight_bytes) == layers
    assert cold_layers(spec, TARGETS[arch], 2000, weight_bytes) == 2000
    assert cold_layers(dataclasses.replace(spec, weight="none"), TARGETS[arch], 61, weight_bytes) == 61


@pytest.mark.parametrize(("weight", "layers"), [("bf16", 61), ("fp8", 120), ("fp8-block", 120), ("mxfp4", 240)])
def test_codes_are_fewer_bytes_to_keep_cold(weight, layers):
    spec = PrologueSpec(heads=16, nope_dim=128, lora_rank=512, rope_dim=64, rope_style="gptj", weight=weight)
    assert layers_of(spec, SM_90, [], 61) == layers


def test_the_smallest_weights_decide():
    spec = PrologueSpec(heads=16, nope_dim=128, lora_rank=512, rope_dim=64, rope_style="gptj")
    assert layers_of(spec, SM_90, [], 61) == layers_of(spec, SM_90, [EAGER], 61) == 61
    assert layers_of(spec, SM_90, [EAGER, PEERS["aiter-triton"]], 61) == 120


# Workloads


@pytest.mark.parametrize("tokens", [1, 1025])
def test_a_workload_is_what_it_says(tokens):
    spec = small_spec(kv_dtype="bf16")
    work = make_workload(spec, TARGETS["gfx942"], tokens, 3, device="cpu")
    assert (work.tokens, work.layers, len(work.w_uk)) == (tokens, 3, 3)
    assert work.q_dtype is torch.float8_e4m3fnuz
    assert work.caches[0].dtype is torch.bfloat16
    assert work.slot_mapping.unique().numel() == tokens
    assert int(work.slot_mapping.max()) < work.caches[0].shape[0]
    assert work.caches[0].shape[0] % workloads.BLOCK_SIZE == 0
    assert not torch.equal(work.w_uk[0], work.w_uk[1])
    again = make_workload(spec, TARGETS["gfx942"], tokens, 3, device="cpu")
    assert torch.equal(work.q, again.q)
    assert torch.equal(work.w_uk[2], again.w_uk[2])


@pytest.mark.parametrize(
    ("weight", "code_bytes", "scale_bytes"), [("fp8", 1, 12), ("fp8-block", 1, 24), ("mxfp4", 0.5, 3 * 2 * 160)]
)
def test_a_workload_of_codes(weight, code_bytes, scale_bytes):
    """The values stand beside them, in the model's dtype, for those who want them: of fp8 and e2m1 they are nearly exact."""
    spec = small_spec(weight=weight, nope_dim=64, lora_rank=160)
    work = make_workload(spec, SM_90, 2, 2, device="cpu")
    assert len(work.codes) == len(work.w_uk) == 2
    assert work.weight_bytes == 3 * 64 * 160 * code_bytes + scale_bytes
    for values, codes in zip(work.w_uk, work.codes, strict=True):
        assert values.dtype is torch.bfloat16
        assert torch.equal(values, workloads.weight_values(codes).to(torch.bfloat16))
    assert not make_workload(dataclasses.replace(spec, weight="bf16"), SM_90, 2, 2, device="cpu").codes


# Checks


def perfect(oracle: Oracle) -> torch.Tensor:
    """The oracle's own results: q_out returned, the entries in the cache."""
    work = oracle.workload
    cache = work.caches[oracle.layer]
    cache.view(torch.uint8)[work.slot_mapping] = oracle.values["kv_entry"].exact.view(torch.uint8)
    return oracle.values["q_out"].exact.clone()


def test_the_right_result_passes_every_check(oracle):
    result = perfect(oracle)
    assert explained(oracle, result) == rounded(oracle, result) == nothing(oracle, result) == ""
    assert product(oracle, oracle.values["ql_nope"].exact.to(torch.bfloat16)) == ""


def test_a_query_that_is_not_quantised_counts_as_its_values(oracle):
    perfect(oracle)
    values = oracle.unrounded("q_out").to(torch.bfloat16)
    assert rounded(oracle, values) == ""
    assert "q_out nope" in rounded(oracle, values * 1.05)
    assert rounded(oracle, values * 1.05, absorb_error=0.05).startswith("q_out pe")


def spoiled(tensor: torch.Tensor, place: tuple) -> torch.Tensor:
    """`tensor` with the fp8 codes at `place` turned round: other values of the same size."""
    codes = tensor.clone()
    codes.view(torch.uint8)[place] ^= 0x80
    return codes


@pytest.mark.parametrize("column", [0, 95, 96, 127])
def test_one_wrong_code_is_not_explained(oracle, column):
    wrong = spoiled(perfect(oracle), (4, 2, column))
    assert explained(oracle, wrong).startswith("q_out nope" if column < 96 else "q_out pe")


def test_a_wrong_row_is_not_rounding(oracle):
    right = perfect(oracle)
    assert rounded(oracle, spoiled(right, (0, 1))).startswith("q_out nope: a row is off by 200 %")
    assert rounded(oracle, spoiled(right, (0, 1, slice(96, None)))).startswith("q_out pe: a row is off by 200 %")
    assert "shape [4, 3, 96]" in rounded(oracle, right[:4])
    assert "off by" in product(oracle, -oracle.values["ql_nope"].exact.to(torch.bfloat16))
    work = oracle.workload
    cache = work.caches[oracle.layer]
    cache[work.slot_mapping[0]] = cache[work.slot_mapping[1]]
    assert rounded(oracle, right).startswith("kv_entry nope")
    assert explained(oracle, right).startswith("kv_cache nope")


@pytest.mark.parametrize("left_out", ["write_q", "write_kv"])
def test_a_part_is_explained_without_the_other(left_out):
    oracle = Oracle.of(make_workload(small_spec(**{left_out: False}), SM_90, 5, 2, device="cpu"), 1)
    work = oracle.workload
    if left_out == "write_q":
        result, written = None, work.caches[1]
        written.view(torch.uint8)[work.slot_mapping] = oracle.values["kv_entry"].exact.view(torch.uint8)
    else:
        result = written = oracle.values["q_out"].exact.clone()
    assert (work.out() is None) == (result is None)
    assert explained(oracle, result) == ""
    written.view(torch.uint8).fill_(POISON)
    assert explained(oracle, result)


def test_a_pair_is_explained_part_by_part():
    oracle = Oracle.of(make_workload(small_spec(q_split=True), SM_90, 5, 2, device="cpu"), 1)
    work = oracle.workload
    work.caches[1].view(torch.uint8)[work.slot_mapping] = oracle.values["kv_entry"].exact.view(torch.uint8)
    pair = tuple(oracle.values[name].exact.clone() for name in work.spec.q_results)
    assert [(each.shape, each.dtype) for each in work.out()] == [(each.shape, each.dtype) for each in pair]
    assert explained(oracle, pair) == ""
    for number, name in enumerate(work.spec.q_results):
        wrong = [*pair]
        wrong[number] = spoiled(pair[number], (4, 2, 1))
        assert explained(oracle, tuple(wrong)).startswith(f"{name}: ")


def test_what_nobody_wrote_is_wrong(oracle):
    oracle.workload.caches[oracle.layer].view(torch.uint8).fill_(POISON)
    result = oracle.workload.empty(oracle.workload.spec.entry_dim, torch.float8_e4m3fn)
    result.view(torch.uint8).fill_(POISON)
    assert "off by inf" in rounded(oracle, result)
    assert explained(oracle, result)


# Methods


def test_each_method_is_checked_and_then_timed_in_turn(oracle):
    clock = Clock(3.0, 2.0)
    methods = {"one": EAGER.candidates, "two": EAGER.candidates}
    row = measure_methods(oracle, methods, 4, clock)
    assert row == Row(tokens=5, layers=2, us={"one": 3.0, "two": 2.0}, failures={})
    assert clock.layers == {2}
    one, two = clock.log[:2]
    assert clock.log == [one, two] * 4


def test_the_fastest_candidate_counts(oracle):
    (right,) = EAGER.candidates(oracle.workload)
    candidates = [dataclasses.replace(right, name=name) for name in ("slow", "fast", "middling")]
    row = measure_methods(oracle, {"method": lambda work: candidates}, 3, Clock(5.0, 2.0, 4.0))
    assert row.us == {"method": 2.0}


def test_a_wrong_candidate_never_wins(oracle):
    (right,) = EAGER.candidates(oracle.workload)
    wrong = Candidate("wrong", constant(perfect(oracle)), rounded)  # right once, but its replay writes nothing
    row = measure_methods(oracle, {"method": lambda work: [wrong, right]}, 3, Clock(1.0, 7.0))
    assert row.us == {"method": 7.0}
    row = measure_methods(oracle, {"method": lambda work: [wrong], "eager": EAGER.candidates}, 3, Clock(1.0, 7.0))
    assert row.us == {"eager": 7.0}
    assert row.failures["method"].startswith("wrong: q_out nope: a row is off by")


def test_a_method_that_fails_leaves_the_others_alone(oracle):
    def broken(work):
        raise ImportError("no\nsuch library " + "x" * 500)

    def out_of_memory(work):
        def launch(layer):
            raise MlagenError("no room")

        return [Candidate("it", launch, nothing)]

    methods = {"broken": broken, "full": out_of_memory, "none": lambda work: [], "eager": EAGER.candidates}
    row = measure_methods(oracle, methods, 1, Clock())
    assert row.us == {"eager": 1.0}
    assert row.failures["broken"].startswith("ImportError: no such library xxx")
    assert len(row.failures["broken"]) < 250
    assert row.failures["full"] == "no room"
    assert row.failures["none"] == "there is no way to run it"


def test_the_ratio_to_the_floor():
    assert Row(1, 61, {OWN: 3.0, STREAM: 2.0}, {}).ratio == 1.5
    assert Row(1, 61, {OWN: 3.0}, {STREAM: "failed"}).ratio is None
