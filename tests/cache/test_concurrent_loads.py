"""Threads that load: the same kernel is made once, different ones are made side by side."""

import threading
from dataclasses import replace

import pytest

from mlagen import runtime
from mlagen.errors import BuildError
from mlagen.runtime import load
from mlagen.target import TARGETS

SECONDS = 60


class Module:
    def parameters(self, address):
        return address

    def launch(self, grid, block, parameters, shared_bytes=0):
        pass


@pytest.fixture
def making(monkeypatch):
    """What stands for a compile: `making.during` runs in it, and `making.made` lists whose kernels were made."""

    class Making:
        def __init__(self):
            self.made, self.during = [], lambda spec: None

        def __call__(self, spec, target, device, bundle, generated):
            self.made.append(generated.name)
            self.during(spec)
            return Module()

    found = Making()
    monkeypatch.setattr(runtime, "_KERNELS", {})
    monkeypatch.setattr(runtime, "_LOADING", {})
    monkeypatch.setattr(runtime, "_load_module", found)
    return found


def run_together(*actions):
    """What each gave or raised, by threads that start at once."""
    results = [None] * len(actions)
    together = threading.Barrier(len(actions), timeout=SECONDS)

    def work(number, action):
        together.wait()
        try:
            results[number] = action()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    return results


def test_one_kernel_is_made_once_and_is_the_same_for_all(making, spec):
    kernels = run_together(*[lambda: load(spec, "cpu", arch="gfx950")] * 8)
    assert len(making.made) == 1
    assert len(set(map(id, kernels))) == 1
    assert load(spec, "cpu", arch="gfx950") is kernels[0]


def test_different_kernels_are_made_at_once(making, spec):
    """Each waits, while it is made, for the other to be made as well."""
    meeting = threading.Barrier(3, timeout=SECONDS)
    making.during = lambda _: meeting.wait()
    wanted = [(spec, "gfx950"), (spec, "gfx942"), (replace(spec, heads=7), "gfx950")]
    kernels = run_together(*[lambda each=each: load(each[0], "cpu", arch=each[1]) for each in wanted])
    assert [(kernel.spec, kernel.target.arch) for kernel in kernels] == wanted
    assert len(making.made) == 3


def test_who_waits_for_a_failure_tries_again(making, spec):
    """A failed compile is nobody else's failure, and locks nobody out."""

    def fail_once(_):
        if len(making.made) == 1:
            raise BuildError("no luck")

    making.during = fail_once
    results = run_together(*[lambda: load(spec, "cpu", arch="gfx950")] * 4)
    assert sum(isinstance(each, BuildError) for each in results) == 1
    assert len({id(each) for each in results if not isinstance(each, BuildError)}) == 1
    assert len(making.made) == 2


def test_the_kernel_for_rows_that_are_not_aligned_is_made_once_when_it_is_needed(spec):
    made = []

    def make():
        made.append(threading.get_ident())
        return len(made)

    once = runtime._once(make)
    assert made == []
    assert run_together(*[once] * 8) == [1] * 8
    assert len(made) == 1


@pytest.mark.host
def test_specs_that_share_a_kernel_compile_it_once(compiler, spec, monkeypatch):
    """Heads are a run-time argument: two kernels of this process, one of the cache."""
    monkeypatch.setattr(runtime, "_KERNELS", {})
    specs = [replace(spec, heads=heads) for heads in (1, 2, 3, 4)]
    kernels = run_together(*[lambda each=each: load(each, "cpu", arch="gfx950") for each in specs])
    assert [kernel.spec for kernel in kernels] == specs
    assert compiler.compiles == 1
    assert all(kernel.target is TARGETS["gfx950"] for kernel in kernels)
