"""Calls after the first: what was checked once is recognised, and what has changed since, even in place, is not mistaken for it."""

import gc
import itertools
import threading
from dataclasses import replace

import pytest
import torch
from helpers import Workload, make_launch, output_bytes, small_spec

from mlagen import signature
from mlagen.errors import ArgumentError
from mlagen.runtime import Kernel, load
from mlagen.verify import compare_case, describe

pytestmark = pytest.mark.host

TOKENS = 5
DENSE = Workload(tokens=TOKENS, layout="dense", cache="dense", out="dense")
JOINED = replace(DENSE, layout="joined")


@pytest.fixture(params=["torch's guards", "in Python"])
def kernel(request, monkeypatch) -> Kernel:
    """A kernel that has seen no call, with either way to recognise tensors."""
    if request.param == "in Python":
        monkeypatch.setattr(signature, "_guards", lambda: None)
    found = load(small_spec(), "cpu", arch="gfx942")
    return Kernel(found.spec, found.target, found.device, found.variants)


def assert_done(kernel, launch):
    """A launch's outputs are right."""
    wrong = [describe(part) for part in compare_case(kernel.spec, kernel.target, launch.case) if not part.passed]
    assert not wrong, wrong


def assert_right(kernel, launch):
    """A launch is run, and does it right."""
    kernel(**launch.arguments)
    assert_done(kernel, launch)


def poison(launch):
    launch.case.q_out.tensor.view(torch.uint8).fill_(0x5A)


# In-place changes after which the argument is wrong: what is done to it, and a word of the message.
SPOILED = {
    "kv_c": [
        (lambda tensor: tensor.resize_(TOKENS - 1, tensor.shape[1]), "shape"),
        (lambda tensor: tensor.set_(torch.zeros(TOKENS, tensor.shape[1] + 1, dtype=tensor.dtype)), "shape"),
        (lambda tensor: setattr(tensor, "data", tensor.data.float()), "float32"),
        (lambda tensor: tensor.as_strided_(tensor.shape, (2, 2)), "stride"),
        (lambda tensor: setattr(tensor, "data", torch.zeros(tensor.shape[::-1], dtype=tensor.dtype).mT), "stride"),
    ],
    "packed": [
        (lambda tensor: tensor.resize_(2, *tensor.shape[1:]), "shape"),
        (lambda tensor: tensor.set_(torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)), "multiple of 16"),
        (lambda tensor: tensor.transpose_(-1, -2), "expected"),
    ],
    "kv_cache": [
        (lambda tensor: setattr(tensor, "data", tensor.data.view(torch.float8_e4m3fn)), "flavour"),
        (lambda tensor: setattr(tensor, "data", tensor.data[:, :0]), "shape"),
        (lambda tensor: setattr(tensor, "data", tensor.data[:1].expand_as(tensor)), "overlap"),
    ],
    "slot_mapping": [(lambda tensor: tensor.resize_(TOKENS - 1), "shape"), (lambda tensor: tensor.fill_(10**6), "slot 1000000")],
    "positions": [
        (lambda tensor: setattr(tensor, "data", tensor.data.short()), "int16"),
        (lambda tensor: tensor.t_().unsqueeze_(0), "shape"),
    ],
    "cos_sin_cache": [(lambda tensor: setattr(tensor, "data", tensor.data[:, 2:]), "shape")],
    "k_scale": [
        (lambda tensor: tensor.resize_(2), "shape"),
        (lambda tensor: setattr(tensor, "data", tensor.data.double()), "float64"),
    ],
    "out": [(lambda tensor: tensor.resize_(2, 3, 128), "shape")],
}


@pytest.mark.parametrize(
    ("name", "spoil", "word"),
    [(name, spoil, word) for name, changes in SPOILED.items() for spoil, word in changes],
    ids=[f"{name}-{number}" for name, changes in SPOILED.items() for number in range(len(changes))],
)
def test_an_argument_that_went_wrong_in_place_is_refused(kernel, name, spoil, word):
    launch = make_launch(kernel, DENSE)
    for _ in range(2):
        assert_right(kernel, launch)
    poison(launch)
    before = output_bytes(launch).clone()
    spoil(launch.arguments[name])
    for _ in range(2):
        with pytest.raises(ArgumentError, match=rf"^{name}: ") as caught:
            kernel(**launch.arguments)
        assert word in str(caught.value)
    assert torch.equal(before, output_bytes(launch))


@pytest.mark.parametrize("first", [DENSE, JOINED], ids=["pair", "joined"])
def test_the_same_objects_with_other_shapes_and_strides(kernel, first):
    """Every tensor of a call becomes that of another call, one with another number of tokens, strides, caches and tables."""
    others = [
        replace(first, tokens=9, block_size=7),
        replace(first, slots_dtype=torch.int32, positions_dtype=torch.int32, table_dtype="fp32", max_position=17),
        replace(first, cache="interleaved", out="head major", k_pe_rank=3),
        replace(first, cache="padded", out="spare heads", bytes_cache=True),
    ]
    held = make_launch(kernel, first)
    assert_right(kernel, held)
    for seed, workload in enumerate((*others, first, *others), start=1):
        launch = make_launch(kernel, workload, seed=seed)
        for name, value in launch.arguments.items():
            mine = held.arguments[name]
            pairs = zip(mine, value, strict=True) if isinstance(value, tuple) else ((mine, value),)
            for tensor, other in pairs:
                tensor.data = other
        kernel(**held.arguments)
        assert_done(kernel, launch)


def test_objects_that_take_the_place_of_dead_ones(kernel):
    """Call after call with new tensors of another shape at each, so that addresses and ids come back with other shapes."""
    ids = set()
    repeated = 0
    for seed, tokens in enumerate(itertools.islice(itertools.cycle((3, 8, 1, 5)), 24)):
        launch = make_launch(kernel, replace(DENSE, tokens=tokens), seed=seed)
        seen = {id(each) for each in launch.arguments.values()}
        repeated += bool(seen & ids)
        ids |= seen
        assert_right(kernel, launch)
        del launch
        gc.collect()
    assert repeated, "no id came back: this tested nothing"


def test_a_call_with_one_object_in_two_places(kernel):
    launch = make_launch(kernel, replace(DENSE, positions_dtype=torch.int64))
    scale = launch.arguments["q_scale"]
    launch.case.inputs["k_scale"].copy_(launch.case.inputs["q_scale"])
    for _ in range(3):
        assert_right(kernel, replace(launch, arguments={**launch.arguments, "q_scale": scale, "k_scale": scale}))


def test_forms_of_a_call_do_not_mix(kernel):
    """One q or two, one table or two, with and without scales and out; then what looks like another form, and is wrong."""
    launches = [
        make_launch(kernel, replace(DENSE, layout=layout, table=table, scales=scales), seed=1)
        for layout in ("dense", "joined")
        for table in ("joined", "pair")
        for scales in ("given", "none")
    ]
    for _ in range(2):
        for launch in launches:
            assert_right(kernel, launch)
            poison(launch)
    joined, pairs = launches[-1].arguments, launches[2].arguments
    table = launches[0].arguments["cos_sin_cache"]
    for wrong in (
        {"q": (launches[-1].arguments["q"], None)},
        {"q": [launches[-1].arguments["q"]]},
        {"q": pairs["q"][0]},
        {"q": (None, pairs["q"][1])},
        {"q": pairs["q"][::-1]},
        {"cos_sin_cache": (table, None)},
        {"cos_sin_cache": (None, table)},
        {"cos_sin_cache": pairs["cos_sin_cache"][0]},
    ):
        for _ in range(2):
            with pytest.raises(ArgumentError, match=rf"^{next(iter(wrong))}"):
                kernel(**{**joined, **wrong})


def test_weights_for_a_kernel_that_takes_none_are_refused_every_time():
    kernel = load(small_spec(weight="none"), "cpu", arch="gfx942")
    launch = make_launch(kernel, DENSE)
    for packed in (None, torch.zeros(1), None, torch.ones(())):
        if packed is None:
            assert_right(kernel, launch)
            continue
        with pytest.raises(ArgumentError, match=r"^packed: this kernel does no absorb"):
            kernel(**{**launch.arguments, "packed": packed})


@pytest.mark.parametrize("grad", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_mode_of_autograd_does_not_matter(kernel, grad):
    launch = make_launch(kernel, DENSE)
    assert_right(kernel, launch)
    poison(launch)
    with grad():
        kernel(**launch.arguments)
        fresh = make_launch(kernel, DENSE, seed=3)
        kernel(**fresh.arguments)
    assert_right(kernel, launch)
    assert_right(kernel, fresh)


def test_threads_with_different_numbers_of_tokens(kernel):
    """Eight threads, one kernel, calls of changing shapes that no plan exists for at the start."""
    launches = [
        [
            make_launch(kernel, replace(DENSE, tokens=1 + (number + turn) % 8, layout=layout), seed=10 * number + turn)
            for turn in range(6)
        ]
        for number, layout in enumerate(("dense", "joined", "sliced", "dense") * 2)
    ]
    for module in {each.module() for each in kernel.variants}:
        module.cpu_threads = 1
    together, errors = threading.Barrier(8, timeout=60), []

    def work(mine):
        try:
            together.wait()
            for launch in mine:
                kernel(**launch.arguments)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in launches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for launch in itertools.chain.from_iterable(launches):
        assert_done(kernel, launch)


LAYOUTS = {
    "segmented": small_spec(kv_layout="segmented"),
    "fp8_ds_mla": small_spec(kv_layout="fp8_ds_mla", lora_rank=128),
    "KV heads": small_spec(kv_heads=2),
}


@pytest.mark.parametrize("spec", LAYOUTS.values(), ids=LAYOUTS)
def test_other_cache_layouts_in_the_same_objects(spec):
    """Tensors become those of another call, with other blocks and strides; then a cache that does not fit, and back."""
    found = load(spec, "cpu", arch="gfx942")
    kernel = Kernel(found.spec, found.target, found.device, found.variants)
    held = make_launch(kernel, DENSE)
    assert_right(kernel, held)
    others = [
        replace(DENSE, block_size=7),
        replace(DENSE, cache="padded"),
        replace(DENSE, cache="interleaved", tokens=9, block_size=3),
        DENSE,
    ]
    for seed, workload in enumerate((*others, *others)):
        launch = make_launch(kernel, workload, seed=seed)
        for name, value in launch.arguments.items():
            mine = held.arguments[name]
            for tensor, other in zip(mine, value, strict=True) if isinstance(value, tuple) else ((mine, value),):
                tensor.data = other
        kernel(**held.arguments)
        assert_done(kernel, launch)
        cache = held.arguments["kv_cache"]
        kept = cache.data
        cache.data = cache.data[..., :-1]
        before = output_bytes(launch).clone()
        for _ in range(2):
            with pytest.raises(ArgumentError, match=r"^kv_cache: shape"):
                kernel(**held.arguments)
        assert torch.equal(before, output_bytes(launch))
        cache.data = kept
