"""The sweep: every shape, type, layout and edge of the inputs, in pairs: each value of each factor meets each value of each other.

Specs and launches are two covering arrays.  A kernel is compiled for a spec and runs the launches that fall to it; heads belong to
the launches, because kernels that differ in heads only are the same.
"""

import contextlib
import itertools
from dataclasses import replace

import torch
from helpers import Row, covering

from mlagen.codegen import generate
from mlagen.errors import ScheduleError
from mlagen.layout import Layout
from mlagen.lowering import lower
from mlagen.runtime import Kernel, variants_of
from mlagen.schedule import m_tiles_to_try
from mlagen.spec import PrologueSpec
from mlagen.tables import Range
from mlagen.target import TARGETS, Target
from mlagen.tune import BLOCKS, WAVES

ARCHS = tuple(TARGETS)

SPEC_FACTORS = {
    "nope_dim": (16, 32, 48, 64, 128, 192, 256, 512),
    "lora_rank": (16, 32, 48, 64, 80, 256, 512, 576),
    "rope_dim": (0, 2, 6, 32, 64, 128),
    "rope_style": ("none", "gptj", "neox"),
    "arch": ARCHS,
    "dtype": ("bf16", "fp16"),
    "weight": ("model", "fp8", "fp8-block", "mxfp4", "none"),
    "q_fp8": (True, False),
    "kv_fp8": (True, False),
    "rounding": ("fused", "stepwise"),
    "fp8_max": (None, 224.0),
    "nope_first": (True, False),
    "kv_heads": (1, 2, 5),
    "kv_layout": ("paged", "segmented", "fp8_ds_mla"),
    "compute": ("a16", "a8"),
    "results": ("both", "query", "cache"),
    "q_form": ("joined", "split", "token"),
}

LAUNCH_FACTORS = {
    "heads": (1, 3, 5, 12, 16, 20, 40, 64, 128),
    "tokens": (0, 1, 2, 7, 8, 15, 16, 17, 33, 64, 65, 256),
    "block_size": (1, 16, 17, 64, 1536),
    "cache": ("dense", "padded", "interleaved"),
    "bytes_cache": (False, True),
    "out": ("dense", "spare heads", "head major"),
    "layout": ("dense", "sliced", "transposed", "joined"),
    "k_pe_rank": (2, 3),
    "slots": ("some", "none", "first", "last", "all"),
    "slots_dtype": (torch.int64, torch.int32),
    "positions": ("mixed", "stale"),
    "positions_dtype": (torch.int64, torch.int32),
    "max_position": (1, 300),
    "table": ("joined", "pair"),
    "table_dtype": ("model", "fp32"),
    "scales": ("given", "none"),
    "special": (False, True),
}

LAYOUTS = tuple(itertools.starmap(Layout, itertools.product(WAVES, BLOCKS, (False, True))))
"""Every way to lay out the absorb that `mlagen tune` may choose, each with any width of its tiles."""

PRODUCTS_LIMIT = 300e6
"""Multiplications of one launch: what the oracle does in a second."""


def sensible(row: Row) -> bool:
    rotates = row["rope_style"] != "none"
    q_fp8, kv_fp8 = row["q_fp8"] and row["results"] != "cache", row["kv_fp8"] and row["results"] != "query"
    unsplit = row["rope_dim"] == 0 or row["results"] == "cache"
    if row["q_form"] == "split" and unsplit:
        return False
    too_large = row["weight"] != "none" and row["nope_dim"] == 512  # on sm_90, for whole rows in a workgroup
    if row["q_form"] == "token" and (too_large or not q_fp8):
        return False
    if row["kv_layout"] != "paged":
        if row["kv_heads"] > 1 or not row["nope_first"]:
            return False
        if row["kv_layout"] == "fp8_ds_mla" and (row["lora_rank"] % 128 or not row["kv_fp8"] or (row["fp8_max"] and not q_fp8)):
            return False
    if row["compute"] == "a8" and row["weight"] != "fp8":
        return False
    if row["weight"] in ("fp8-block", "mxfp4") and row["nope_dim"] % 32:
        return False
    if row["weight"] == "mxfp4" and row["dtype"] != "bf16":
        return False
    return not (rotates and row["rope_dim"] == 0) and not (row["fp8_max"] and not q_fp8 and not kv_fp8)


def spec_of(row: Row, heads: int) -> PrologueSpec:
    dtype = row["dtype"]
    return PrologueSpec(
        heads=heads,
        weight=dtype if row["weight"] == "model" else row["weight"],
        q_dtype="fp8" if row["q_fp8"] else dtype,
        kv_dtype="fp8" if row["kv_fp8"] else dtype,
        q_scaling="token" if row["q_form"] == "token" else "static",
        q_split=row["q_form"] == "split",
        write_q=row["results"] != "cache",
        write_kv=row["results"] != "query",
        **{name: row[name] for name in SPEC_FACTORS if name not in ("arch", "weight", "q_fp8", "kv_fp8", "results", "q_form")},
    )


def assign(specs: list[Row], launches: list[Row]) -> list[list[Row]]:
    """Deals the launches to the specs in turn, each to the next for which it is not too large; each spec gets one at least."""
    hands: list[list[Row]] = [[] for _ in specs]
    queue = list(range(len(specs)))
    spare = [launch for launch in launches if launch["tokens"] * launch["heads"] <= 1000]
    for launch in launches + spare:

        def fits(at: int, launch: Row = launch) -> bool:
            size = specs[at]["nope_dim"] * specs[at]["lora_rank"]
            return launch["tokens"] * launch["heads"] * size <= PRODUCTS_LIMIT

        chosen = next(at for at in queue if fits(at))
        queue.append(queue.pop(queue.index(chosen)))
        hands[chosen].append(launch)
    return hands


SPECS = covering(SPEC_FACTORS, sensible)
HANDS = assign(SPECS, covering(LAUNCH_FACTORS))


def other_layouts(spec: PrologueSpec, target: Target) -> list[Layout]:
    """The layouts that fit a spec on a target, the one that always fits left out."""
    found = []
    widths = m_tiles_to_try(lower(spec.program(target)), target)
    for layout, m_tiles in itertools.product(LAYOUTS, widths) if spec.absorbs else ():
        layout = replace(layout, m_tiles=m_tiles)
        if layout != Layout():
            with contextlib.suppress(ScheduleError):
                generate(spec, target, layout)
                found.append(layout)
    return found


def kernel_with(spec: PrologueSpec, target: Target, device: torch.device, layout: Layout) -> Kernel:
    """A kernel that has one layout for all numbers of tokens."""
    return Kernel(spec, target, device, variants_of(spec, target, device, [Range(None, layout)]))


def label(row: Row) -> str:
    style = f"{row['rope_style']}{row['rope_dim']}"
    q, kv = ("fp8" if row[name] else "same" for name in ("q_fp8", "kv_fp8"))
    width = row["nope_dim"] if row["weight"] != "none" else "absorbed"
    parts = (row["arch"], row["dtype"], width, row["lora_rank"], style, q, kv, row["rounding"], row["fp8_max"] or "")
    parts += () if row["nope_first"] else ("rope first",)
    parts += () if row["kv_heads"] == 1 else (f"{row['kv_heads']} KV heads",)
    parts += () if row["kv_layout"] == "paged" else (row["kv_layout"],)
    parts += () if row["q_form"] == "joined" else (row["q_form"],)
    parts += () if row["results"] == "both" else (f"{row['results']} only",)
    parts += () if row["weight"] in ("model", "none") else (row["weight"],)
    parts += () if row["compute"] == "a16" else (row["compute"],)
    return "-".join(map(str, parts)).rstrip("-")
