"""A program: AITER's Triton operators from the checkout that AITER_ROOT names, on the GPU or in Triton's interpreter.

    python triton_calls.py REQUEST RESULTS

A process of its own, because Triton decides at import whether it interprets, and because the checkout's modules take the name of
an installed AITER.  REQUEST is a torch file with the device, the arch that AITER is told, and the calls: an operator's name, and
its arguments by name.  RESULTS gets for each call the operator's four results by name, and kv_cache.
"""

import os
import sys
import types
from typing import Any

import torch

from mlagen.peers.aiter_source import import_from
from mlagen.peers.aiter_triton import from_checkout

RESULTS = ("q_out", "decode_q_pe_out", "k_pe_out", "q_nope_zeros_out")

FORMATS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e4b8": torch.float8_e4m3fnuz,
}
"""Triton's names of what torch converts between."""


def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """A numpy array of one float format in another, rounded to nearest even, as a GPU does.

    Triton 3.6's interpreter cuts fp32 off when it converts to bf16.  To fp8 it rounds ties away from zero, cuts subnormals off, and
    puts the carry out of the fraction in place by an `or`, which loses it where the exponent is odd: 1.97 becomes 1.  With that a
    kernel that quantises what it multiplies would be compared with noise.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    values = torch.tensor(data.view(f"i{data.itemsize}")).view(FORMATS[source.name])
    converted = values.float().to(FORMATS[target.name])
    return converted.view(bits[converted.itemsize]).numpy()


def prepare_interpreter(arch: str) -> None:
    """What Triton's interpreter lacks where there is no GPU: an arch, and conversions between formats."""
    from triton.runtime import driver, interpreter

    target = types.SimpleNamespace(backend="hip", arch=arch, warp_size=64)
    driver.set_active(types.SimpleNamespace(get_current_target=lambda: target))
    interpreter._convert_float = convert


def main(request_path: str, results_path: str) -> None:
    request, root = torch.load(request_path), os.environ["AITER_ROOT"]
    if request["device"] == "cpu":
        prepare_interpreter(request["arch"])
    fused_kv_cache = import_from(root, "aiter.ops.triton.fusions.fused_kv_cache", request["arch"])
    operators = {
        "fused_qk_rope_cat_and_cache_mla": fused_kv_cache.fused_qk_rope_cat_and_cache_mla,
        "fused_fp8_bmm_rope_cat_and_cache_mla": from_checkout(root, request["arch"]),
    }
    results = []
    for name, arguments in request["calls"]:
        given = {key: each.to(request["device"]) if isinstance(each, torch.Tensor) else each for key, each in arguments.items()}
        returned = dict(zip(RESULTS, operators[name](**given), strict=True))
        results.append({key: each.cpu() for key, each in {**returned, "kv_cache": given["kv_cache"]}.items()})
    torch.save(results, results_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
