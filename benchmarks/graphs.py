"""How many nodes a layer's graph has before and after the prologue is fused, and how long the pass takes; for docs/fx.md.

    python benchmarks/graphs.py

On the CPU, with the spellings of the tests: a layer of two heads and its attention, compiled for 2 to 64 rows.  A second run has
the kernels in mlagen's cache, and times the pass without their compiler.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import fx_custom_ops
import fx_models
from fx_compiled import CONFIG, marked

from mlagen.fx import explained


def main() -> None:
    print("| spelling | nodes before | after | pass, ms |\n|---|---|---|---|")
    for name, kind in {**fx_models.SPELLINGS, **fx_custom_ops.SPELLINGS}.items():
        torch._dynamo.reset()
        layer = kind()
        x, slots, positions = marked(16)
        with torch.no_grad(), explained(CONFIG) as reports:
            torch.compile(layer, fullgraph=True)(x, fx_models.new_cache(layer), slots, positions)
        (report,) = reports
        assert report.changed == 1, report
        print(f"| {name} | {report.nodes_before} | {report.nodes_after} | {report.seconds * 1e3:.0f} |", flush=True)


if __name__ == "__main__":
    main()
