"""How long mlagen.load takes in this process, which has loaded nothing yet, and what takes it: one line of JSON, in milliseconds.

`python benchmarks/fresh_load.py cuda`, or an arch, whose binary is then found but not handed to a driver.  runtime.py runs it with
a cache of its own, which the first run fills.  Imports, and making the GPU's context, are done before and not counted.
"""

import functools
import json
import sys
import time
from typing import Any

import jinja2
import torch

from mlagen import binaries, codegen, cuda_toolchain, runtime, toolchain
from mlagen.cache import DiskCache
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS

SPEC = PrologueSpec.from_model("deepseek-r1", tp=8)

Times = dict[str, float]


def watch(times: Times, name: str, owner: Any, attribute: str) -> None:
    """Add the time spent in a function to `times`."""
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            times[name] = times.get(name, 0.0) + 1e3 * (time.perf_counter() - start)

    setattr(owner, attribute, timed)


def main(where: str) -> None:
    times: Times = {}
    watch(times, "schedule", codegen, "choose_schedule")
    watch(times, "templates", binaries, "prepare_templates")
    watch(times, "render", jinja2.Template, "render")
    watch(times, "identity", cuda_toolchain, "likely_fingerprint")
    watch(times, "identity", cuda_toolchain, "fingerprint")
    watch(times, "identity", toolchain, "fingerprint")
    watch(times, "read", DiskCache, "read")
    if where != "cuda":
        start = time.perf_counter()
        binaries.device_binary(SPEC, codegen.generate(SPEC, TARGETS[where]), TARGETS[where], None)
    else:
        torch.zeros(1, device="cuda")
        if torch.version.hip:
            from mlagen.drivers.hip import HipModule as Module
            from mlagen.drivers.hip import open_bindings

            open_bindings()
        else:
            from mlagen.drivers.cuda import CudaModule as Module
        watch(times, "module", Module, "__init__")
        start = time.perf_counter()
        runtime.load(SPEC, "cuda")
    times["total"] = 1e3 * (time.perf_counter() - start)
    print(json.dumps(times))


if __name__ == "__main__":
    main(sys.argv[1])
