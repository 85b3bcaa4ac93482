"""Every 16-bit code through the paths that only convert: NaN, infinities, overflow, negative zero and subnormals among them."""

from dataclasses import replace

import pytest
import torch
from helpers import Launch, Workload, make_launch
from isa.machine import ARCHS, Pair, bits, build, run_both

from mlagen.dtypes import model_dtype
from mlagen.spec import PrologueSpec
from mlagen.torch_types import torch_dtype
from mlagen.verify import EXACT_SHARE, compare_case, describe

pytestmark = [pytest.mark.isa, pytest.mark.compiler, pytest.mark.host]

TOKENS, LATENT = 128, 512  # as many elements as there are codes


def all_codes(pair: Pair, scale: float | None) -> list[Launch]:
    """The same launch twice, the device's and the host's: every code once in kv_c and once in q_nope, in different places."""
    dtype = torch_dtype(model_dtype(pair.host.spec.dtype))
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    launches = []
    for kernel in (pair.device, pair.host):
        launch = make_launch(kernel, Workload(TOKENS, cache="dense", layout="dense", slots="all"))
        inputs, arguments = dict(launch.case.inputs), dict(launch.arguments)
        inputs["kv_c"] = arguments["kv_c"] = codes.reshape(TOKENS, LATENT)
        inputs["q_nope"] = codes.flip(0).reshape(TOKENS, 1, LATENT).clone()
        # Rotations too, if only of some codes.
        inputs["k_pe"] = arguments["k_pe"] = codes[3::8].reshape(TOKENS, 64).clone()
        inputs["q_pe"] = codes[5::8].reshape(TOKENS, 1, 64).clone()
        arguments["q"] = (inputs["q_nope"], inputs["q_pe"])
        for name in ("q_scale", "k_scale"):
            inputs[name] = arguments[name] = None if scale is None else torch.tensor(scale)
        launches.append(Launch(replace(launch.case, inputs=inputs), arguments))
    return launches


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("rounding", ["fused", "stepwise"])
@pytest.mark.parametrize("output", ["fp8", "model"])
def test_every_code(arch: str, dtype: str, rounding: str, output: str) -> None:
    out = output if output == "fp8" else dtype
    options = {"dtype": dtype, "weight": "none", "q_dtype": out, "kv_dtype": out, "rounding": rounding}
    spec = PrologueSpec(1, 16, LATENT, 64, "gptj", **options)
    pair = build(spec, arch)
    for scale in (None, 0.037, 1e30) if output == "fp8" else (None,):
        on_device, on_host = all_codes(pair, scale)
        run_both(pair, on_device, on_host)
        # Without a rotation NaN have the same bits, too.
        for name in ("q_out", "kv_cache"):
            device, host = (bits(getattr(launch.case, name).tensor)[..., :LATENT] for launch in (on_device, on_host))
            assert torch.equal(device, host)
        for part in compare_case(spec, pair.host.target, on_device.case):
            # The oracle has no bounds around an infinity, so `outside` means nothing here.
            assert part.exact_share >= (1.0 if part.must_be_exact else EXACT_SHARE), describe(part)
            assert not part.stray
