"""Plans: launches with everything decided but the addresses, made once for calls that look alike and run for each of them."""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Protocol

import torch

from mlagen.abi import Argument
from mlagen.arguments import TENSORS, WIDE_BYTES, Binding
from mlagen.drivers.parameters import WORD_BYTES, Parameters
from mlagen.errors import ArgumentError
from mlagen.schedule import Launch
from mlagen.signature import Matcher

MAX_PLANS = 1024
"""Numbers of tokens and slots whose plans the calls of one form remember; with more, they start over."""

MAX_ALIKE = 8
"""Plans for the same numbers of tokens and slots, which are tried in turn; they differ in strides or in another extent."""

_data_ptr = torch.Tensor.data_ptr


class Module(Protocol):
    """What a driver gives: one loaded kernel."""

    def parameters(self, address: int) -> Any:
        """What launch() takes, of the address of a list of pointers to the arguments, which must outlive it."""

    def launch(self, grid: int, block: int, parameters: Any, shared_bytes: int = 0) -> None:
        """Run `grid` workgroups of `block` lanes, each with `shared_bytes` of shared memory, on the caller's current stream."""


class Plan:
    """A launch of `module` for calls whose tensors look alike; safe to run from several threads.

    Nothing of a call stays behind: a run asks each tensor where it lies, and writes that beside the numbers, which stay the same.
    Zero `tokens` need no run.
    """

    def __init__(
        self,
        matches: Matcher,
        binding: Binding,
        given: Sequence[int],
        arguments: Sequence[Argument],
        numbers: Mapping[str, int],
        module: Module,
        size: tuple[Launch, int],
        *,
        elsewhere: Callable[[], "Plan"] | None,
    ) -> None:
        """`given` are the call's tensors, by their place in TENSORS; `numbers` the values of arguments that are no addresses,
        `size` the grid and the lanes of a workgroup.

        `elsewhere` gives the plan for rows that start anywhere, where this one needs them at multiples of WIDE_BYTES.
        """
        self.matches, self.tokens = matches, binding.tokens
        self._module, self._elsewhere = module, elsewhere
        launch, self._threads = size
        self._grid, self._shared_bytes = launch.grid, launch.shared_bytes
        # The words in memory: where each tensor lies, addresses that lie within one, numbers.
        word_of = {(tensor, 0): word for word, tensor in enumerate(given)}
        shifted = [each for each in binding.pointers.values() if each not in word_of]
        word_of |= {each: len(given) + number for number, each in enumerate(shifted)}
        self._shifted = tuple((given.index(tensor), distance) for tensor, distance in shifted)
        self._pack = struct.Struct(f"<{len(word_of)}Q").pack
        words, places = [bytes(WORD_BYTES * len(word_of))], []
        for argument in arguments:
            if argument.kind == "pointer":
                places.append(word_of[binding.pointers[argument.name]])
            else:
                places.append(len(word_of) + len(words) - 1)
                words.append(struct.pack(argument.word_format, numbers[argument.name]))
        self._words, self._places = b"".join(words), tuple(places)
        self._packed_bits = _low_bits(word_of[binding.pointers[name]] for name in ("w_uk",) if name in binding.pointers)
        self._low_bits = self._packed_bits
        if elsewhere:
            self._low_bits |= _low_bits(word_of[binding.pointers[name]] for name in binding.wide)
        # Not one for each thread: threads come and go, and a call needs one only until the launch returns.
        self._free: list[tuple[Parameters, Any]] = []

    def run(self, tensors: Sequence[torch.Tensor]) -> None:
        """Launch with these tensors, which must match.  Raises ArgumentError for packed weights off their alignment."""
        addresses = list(map(_data_ptr, tensors))
        for number, distance in self._shifted:
            addresses.append(addresses[number] + distance)
        words = self._pack(*addresses)
        if int.from_bytes(words, "little") & self._low_bits:  # all of them at once
            self._run_elsewhere(tensors, words)
            return
        try:
            block = self._free.pop()
        except IndexError:
            parameters = Parameters(self._words, self._places)
            block = parameters, self._module.parameters(parameters.address)
        block[0].write(words)
        self._module.launch(self._grid, self._threads, block[1], self._shared_bytes)
        self._free.append(block)

    def _run_elsewhere(self, tensors: Sequence[torch.Tensor], words: bytes) -> None:
        if int.from_bytes(words, "little") & self._packed_bits:
            raise ArgumentError(f"packed: starts off a multiple of {WIDE_BYTES} bytes: pass what pack_weights returned, or a clone")
        assert self._elsewhere is not None, "only then are other addresses looked at"
        self._elsewhere().run(tensors)


def _low_bits(words: Iterable[int]) -> int:
    """The bits of packed words that are zero where the addresses in `words` are multiples of WIDE_BYTES."""
    return sum((WIDE_BYTES - 1) << (8 * WORD_BYTES * word) for word in set(words))


def fixed_parameters(arguments: Sequence[Argument], values: Iterable[int]) -> Parameters:
    """Parameters of launches that always have the same values, addresses among them."""
    words = b"".join(struct.pack(argument.word_format, value) for argument, value in zip(arguments, values, strict=True))
    return Parameters(words, range(len(arguments)))


class Form:
    """Calls that pass the same of TENSORS, and the plans that served them: `recent` is the latest."""

    def __init__(self, names: Sequence[str]) -> None:
        self.places = tuple(TENSORS.index(name) for name in names)
        self.pick: Callable[[tuple[Any, ...]], tuple[Any, ...]] = itemgetter(*self.places)
        self.recent: Plan | None = None
        self._slots = names.index("slot_mapping") if "slot_mapping" in names else 0
        self._plans: dict[tuple[int, int], tuple[Plan, ...]] = {}

    def find(self, given: Sequence[Any]) -> Plan | None:
        """The plan for tensors like `given`, which may be anything, if there is one."""
        try:
            plans = self._plans.get(self._key(given), ())
        except (AttributeError, IndexError):  # no tensors, or no rows
            return None
        for plan in plans:
            if plan.matches(*given):
                self.recent = plan
                return plan
        return None

    def keep(self, given: Sequence[torch.Tensor], plan: Plan) -> Plan:
        """Remember the plan, which is for tensors like `given`; returns it."""
        if len(self._plans) >= MAX_PLANS:
            self._plans = {}
        key = self._key(given)
        self._plans[key] = (*self._plans.get(key, ())[1 - MAX_ALIKE :], plan)
        self.recent = plan
        return plan

    def _key(self, given: Sequence[torch.Tensor]) -> tuple[int, int]:
        """The extents that vary from call to call, to look up the few plans that only `matches` can tell apart."""
        return given[0].shape[0], given[self._slots].shape[0]
