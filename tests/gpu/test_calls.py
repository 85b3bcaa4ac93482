"""Calls after the first, and from several threads, on a GPU."""

import threading
from dataclasses import replace

import pytest
import torch
from helpers import Workload, make_launch, output_bytes

from mlagen.errors import ArgumentError
from mlagen.runtime import load
from mlagen.spec import PrologueSpec
from mlagen.verify import compare_case, describe

pytestmark = pytest.mark.gpu

SPEC = PrologueSpec(heads=16, nope_dim=128, lora_rank=512, rope_dim=64, rope_style="gptj")
DENSE = Workload(tokens=5, layout="dense", cache="dense", out="dense")


def assert_done(kernel, launch):
    torch.cuda.synchronize()
    wrong = [describe(part) for part in compare_case(kernel.spec, kernel.target, launch.case) if not part.passed]
    assert not wrong, wrong


def run_in_threads(*actions):
    errors = []

    def work(action):
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_a_thread_that_has_not_used_the_gpu_may_launch():
    """The driver's current context belongs to a thread, and nothing but the launch has made one current there."""
    kernel = load(SPEC, "cuda")
    launch = make_launch(kernel, DENSE)
    torch.cuda.synchronize()
    run_in_threads(lambda: kernel(**launch.arguments))
    assert_done(kernel, launch)


def test_threads_with_different_numbers_of_tokens():
    kernel = load(SPEC, "cuda")
    launches = [
        [make_launch(kernel, replace(DENSE, tokens=1 + (number + turn) % 11), seed=10 * number + turn) for turn in range(8)]
        for number in range(6)
    ]
    torch.cuda.synchronize()

    def work(mine):
        with torch.cuda.stream(torch.cuda.Stream()):
            for launch in mine:
                kernel(**launch.arguments)

    run_in_threads(*[lambda mine=mine: work(mine) for mine in launches])
    for mine in launches:
        for launch in mine:
            assert_done(kernel, launch)


def move_by_an_element(tensor):
    tensor.set_(torch.cat((tensor.flatten(), tensor.flatten()[:1]))[1:].view_as(tensor))


@pytest.mark.parametrize(
    ("name", "spoil", "word"),
    [
        ("kv_c", lambda tensor: tensor.resize_(4, 512), "shape"),
        ("kv_c", lambda tensor: setattr(tensor, "data", tensor.data.cpu()), "device"),
        ("packed", move_by_an_element, "multiple of 16"),
        ("kv_cache", lambda tensor: setattr(tensor, "data", tensor.data.view(torch.int8)), "int8"),
        ("k_scale", lambda tensor: setattr(tensor, "data", tensor.data.double()), "float64"),
    ],
)
def test_an_argument_that_went_wrong_in_place_is_refused(name, spoil, word):
    kernel = load(SPEC, "cuda")
    launch = make_launch(kernel, DENSE)
    for _ in range(2):
        kernel(**launch.arguments)
    torch.cuda.synchronize()
    before = output_bytes(launch)
    spoil(launch.arguments[name])
    with pytest.raises(ArgumentError, match=rf"^{name}: .*{word}"):
        kernel(**launch.arguments)
    assert torch.equal(before, output_bytes(launch))


def test_the_same_objects_with_other_shapes():
    kernel = load(SPEC, "cuda")
    held = make_launch(kernel, DENSE)
    kernel(**held.arguments)
    assert_done(kernel, held)
    for seed, tokens in enumerate((9, 1, 5, 9), start=1):
        launch = make_launch(kernel, replace(DENSE, tokens=tokens, block_size=1 + tokens), seed=seed)
        for name, value in launch.arguments.items():
            mine = held.arguments[name]
            for tensor, other in zip(mine, value, strict=True) if isinstance(value, tuple) else ((mine, value),):
                tensor.data = other
        kernel(**held.arguments)
        assert_done(kernel, launch)
