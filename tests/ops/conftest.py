"""Kernels on the host run, with everything that their operators take."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import mlagen
from mlagen import ops
from mlagen.cache_layout import cache_shape
from mlagen.runtime import Kernel
from mlagen.spec import PrologueSpec
from mlagen.torch_types import torch_dtype
from mlagen.verify import make_case

BLOCKS, BLOCK_SIZE, FILL = 10, 16, 0x11
SPARE_SLOTS = 3  # a padded batch: nothing may take its size from the slots
CACHE = 5  # the place of kv_cache among the tensors

SMALL = {"heads": 3, "nope_dim": 32, "lora_rank": 64, "rope_dim": 16, "rope_style": "gptj"}
SETUPS = {
    "fp8": ("gfx950", PrologueSpec(**SMALL)),
    "bf16-neox": ("gfx950", PrologueSpec(**{**SMALL, "rope_style": "neox", "q_dtype": "bf16", "kv_dtype": "bf16"})),
    "no-rope": ("gfx942", PrologueSpec(**{**SMALL, "rope_dim": 0, "rope_style": "none"})),
    "segmented": ("gfx942", PrologueSpec(**SMALL, kv_layout="segmented")),
    "fp8_ds_mla": ("gfx950", PrologueSpec(**{**SMALL, "lora_rank": 128}, kv_layout="fp8_ds_mla")),
    "KV heads": ("gfx942", PrologueSpec(**SMALL, kv_heads=2)),
    "fp8 weights": ("gfx942", PrologueSpec(**SMALL, weight="fp8")),
    "fp8-block weights": ("gfx950", PrologueSpec(**{**SMALL, "nope_dim": 64, "lora_rank": 160}, weight="fp8-block")),
    "mxfp4 weights": ("sm_90", PrologueSpec(**SMALL, weight="mxfp4", q_dtype="bf16")),
    "a8": ("gfx950", PrologueSpec(**SMALL, weight="fp8", compute="a8")),
    "absorbed": ("sm_90", PrologueSpec(**SMALL, dtype="fp16", weight="none", q_dtype="fp16")),  # with an fp8 cache
}

Tensors = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Setup:
    """One kernel, and how its operators are called: torch.ops.mlagen.decode_prologue(*setup.tensors(T), **setup.options)."""

    kernel: Kernel
    options: dict[str, str]
    packed: torch.Tensor | None

    @property
    def spec(self) -> PrologueSpec:
        return self.kernel.spec

    def cache(self, *, as_uint8: bool = False) -> torch.Tensor:
        """A cache of BLOCKS blocks with room behind each, every byte FILL; as bytes where it holds fp8 and `as_uint8` is set."""
        dtype = torch_dtype(self.spec.cache_dtype(self.kernel.target))
        shape = cache_shape(self.spec, BLOCKS, BLOCK_SIZE)
        block = math.prod(shape[1:])
        stored = torch.full((BLOCKS, (block + 64) * dtype.itemsize), FILL, dtype=torch.uint8)
        if not (as_uint8 and dtype.itemsize == 1):
            stored = stored.view(dtype)
        return stored.as_strided(shape, (block + 64, *torch.empty(shape[1:], device="meta").stride()))

    def tensors(self, tokens: int, *, pair: bool = False, as_uint8: bool = False) -> Tensors:
        """The operator's tensors for `tokens` rows, in order, with SPARE_SLOTS slots to spare.

        q is one tensor or, where there is a q_pe and `pair` is set, two.
        """
        inputs = make_case(self.spec, self.kernel.target, tokens).inputs
        q, q_pe = inputs["q_nope"], inputs["q_pe"]
        if not (pair and self.spec.rope_dim):
            q, q_pe = torch.cat((q, q_pe), -1), None
        slots = torch.cat((inputs["slot_mapping"], torch.full((SPARE_SLOTS,), BLOCKS * BLOCK_SIZE - 1)))
        return (
            q, q_pe, inputs["kv_c"], inputs["k_pe"], self.packed, self.cache(as_uint8=as_uint8), slots, inputs["positions"],
            inputs["cos_sin_cache"], None, inputs["q_scale"], inputs["k_scale"],
        )  # fmt: skip

    def assert_as_kernel(self, tensors: Tensors, q_out: torch.Tensor, *, heads: int | None = None) -> None:
        """q_out, and the cache among `tensors`, are bit for bit what the kernel itself makes of them; heads from H on are zero."""
        q, q_pe, kv_c, k_pe, packed, kv_cache, slots, positions, cos, sin, q_scale, k_scale = tensors
        expected_cache = self.cache(as_uint8=kv_cache.dtype is torch.uint8)
        expected = self.kernel(
            q if q_pe is None else (q, q_pe), kv_c, k_pe, packed, expected_cache, slots, positions,
            cos if sin is None else (cos, sin), q_scale=q_scale, k_scale=k_scale,
        )  # fmt: skip
        assert q_out.shape[1] == (heads or self.spec.heads)
        assert_same_bytes(q_out[:, : self.spec.heads], expected)
        room = q_out[:, self.spec.heads :]
        assert_same_bytes(room, torch.zeros_like(room))
        assert_same_bytes(kv_cache, expected_cache)
        if len(q):
            assert (kv_cache.view(torch.uint8) != FILL).any(), "nothing was written to the cache"


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor) -> None:
    integer = {1: torch.uint8, 2: torch.int16}[expected.dtype.itemsize]
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(actual.contiguous().view(integer), expected.contiguous().view(integer))


@pytest.fixture(scope="session")
def setup_of() -> Callable[[str], Setup]:
    @functools.cache
    def get(name: str) -> Setup:
        arch, spec = SETUPS[name]
        kernel = mlagen.load(spec, "cpu", arch=arch)
        inputs = make_case(spec, kernel.target, 0).inputs
        packed = kernel.pack_weights(inputs["w_uk"], inputs.get("w_scale")) if spec.absorbs else None
        return Setup(kernel, {"spec": ops.spec_to_str(spec), "arch": arch}, packed)

    return get


@pytest.fixture(params=SETUPS)
def setup(request: pytest.FixtureRequest, setup_of: Callable[[str], Setup]) -> Setup:
    return setup_of(request.param)
