"""A row of the GPU's result is a function of that row's inputs, bit for bit, also where more tokens take another layout."""

import pytest
import torch

from mlagen.runtime import load
from mlagen.spec import PrologueSpec
from mlagen.verify import make_case

pytestmark = pytest.mark.gpu

TOKENS = 257


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(
    ("heads", "nope_dim", "weight"),
    [
        (16, 128, None),
        (128, 128, None),
        (20, 192, None),
        (16, 128, "fp8"),
        (128, 128, "fp8"),
        (64, 128, "mxfp4"),
        (128, 128, "mxfp4"),
    ],
)
def test_a_row_does_not_depend_on_the_number_of_tokens(heads, nope_dim, weight, pdl):
    """A query in bf16 shows what fp8 would round away."""
    spec = PrologueSpec(heads, nope_dim, 512, 64, "gptj", weight=weight, q_dtype="bf16", kv_dtype="bf16")
    if pdl and torch.version.hip:
        pytest.skip("pdl")
    kernel = load(spec, "cuda", pdl=pdl)
    inputs = make_case(spec, kernel.target, TOKENS, seed=0, device=kernel.device).inputs
    inputs = {name: None if tensor is None else tensor.to(kernel.device) for name, tensor in inputs.items()}
    packed = kernel.pack_weights(inputs["w_uk"], inputs.get("w_scale"))

    def rows(first: int, count: int) -> torch.Tensor:
        part = {name: inputs[name][first : first + count] for name in ("q_nope", "q_pe", "kv_c", "k_pe", "positions")}
        cache = torch.zeros(TOKENS, 16, spec.entry_dim, dtype=torch.bfloat16, device=kernel.device)
        slots = torch.arange(first, first + count, device=kernel.device)
        out = kernel(
            (part["q_nope"], part["q_pe"]), part["kv_c"], part["k_pe"], packed, cache, slots, part["positions"],
            inputs["cos_sin_cache"],
        )  # fmt: skip
        return torch.cat((out.flatten(1), cache.flatten(0, 1)[first : first + count]), -1).view(torch.int16)

    every = rows(0, TOKENS)
    if not torch.version.hip:  # the AMD tables have one layout, and vary how many tokens a workgroup takes
        assert len({variant.generated.name for variant in kernel.variants}) > 1, "one layout for all proves nothing"
    for first, count in ((0, 1), (5, 8), (3, 17), (100, 33), (7, 64), (0, 129), (1, 255)):
        assert torch.equal(rows(first, count), every[first : first + count]), (first, count)
