"""Expressions: numbers, lane arithmetic and operand lists as the C++ text that templates put in.  Python has computed all of it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlagen.codes import LARGEST_EXPONENT
from mlagen.dtypes import DType
from mlagen.errors import ScheduleError
from mlagen.ir import ACTIVATION_GROUP, LEAST_ACTIVATION
from mlagen.staging import Staging
from mlagen.target import FragmentMap, Target
from mlagen.tiles import AbsorbTiles

FP32_BIAS = 127


def lane_expressions(tiles: AbsorbTiles) -> Mapping[str, Any]:
    """The lane arithmetic of the absorb, from the atom's maps, as C++ expressions.

    k_first: first k of a lane's fragment of q; read_token: its token within a tile; sum_token: the first token of its sums;
    l_first: its first latent column within a tile; weight_group: number of the group of lanes that hold the same rows of weights;
    same_token: from which to below which power of two the numbers of lanes differ that have sums of the same tokens;
    sum: the register of sum number i % l_held of token number `column`.
    """
    atom = tiles.atom
    return {
        "k_first": atom.b.lane_expression("k", scale=tiles.fragment_k),
        "read_token": atom.b.lane_expression("n"),
        "sum_token": atom.d.lane_expression("n"),
        "l_first": atom.d.lane_expression("m", scale=tiles.l_run),
        "weight_group": atom.a.lane_expression("m", scale=1),
        "same_token": _lane_bits(atom.d, "m"),
        "sum": atom.d.held_number(m=f"i % {tiles.l_held}", n="column"),
    }


def mx_numbers(target: Target) -> Mapping[str, int]:
    """How e2m1 codes are read as fp8: they mean 2^power times less there, and an e8m0 byte of a packed head, less `offset`, is
    the exponent of the fp32 factor that gives them their value and their scale."""
    power = 7 if target.fp8 is DType.E4M3FNUZ else 6  # the exponent bias of fp8 less that of e2m1
    return {"power": power, "offset": LARGEST_EXPONENT - FP32_BIAS - power}


def activation(tiles: AbsorbTiles, target: Target) -> Mapping[str, Any]:
    """How the query is rounded to fp8: its groups, and between which lanes a group's largest magnitude is found.

    steps: the bits of a lane's number that tell apart those with the same token; reciprocal: of the largest code, in fp32;
    token_lane: which lane has the scale of a lane's token number `column`, "" where it is its own; column: that of sum number i.
    """
    b, d = tiles.atom.b, tiles.atom.d
    steps, below, token_stride = [], 1, 1
    for digit in b.lane:
        if digit.axis == "n":
            token_stride = below
        else:
            steps += [below << bit for bit in range(digit.size.bit_length() - 1)]
        below *= digit.size
    stays = tiles.tokens_per_lane == 1 and b.lane_expression("n") == d.lane_expression("n")
    token = f"({d.lane_expression('n')} + column)"
    return {
        "columns": ACTIVATION_GROUP,
        "groups": -(-tiles.nope_dim // ACTIVATION_GROUP),
        "chunks": ACTIVATION_GROUP // tiles.chunk,
        "steps": steps,
        "least": float_literal(LEAST_ACTIVATION),
        "reciprocal": float_literal(float(np.float32(1.0 / target.fp8.largest))),
        "token_lane": "" if stays else token if token_stride == 1 else f"{token} * {token_stride}",
        "column": d.register_expression("n", "i"),
    }


def _lane_bits(fragment: FragmentMap, axis: str) -> tuple[int, int]:
    """First and end of the powers of two in which the numbers of lanes differ that hold other places along `axis`."""
    first = 1
    for digit in fragment.lane:
        if digit.axis == axis:
            return first, first * digit.size
        first *= digit.size
    raise ScheduleError(f"{fragment}: no lane digit along {axis}")


def wgmma_operands(staging: Staging) -> Mapping[str, Any]:
    """The operand lists of one instruction that multiplies a block: its sums, 4 for each token tile, then the weights."""
    sums = staging.block_tiles * staging.tiles.atom.d.registers
    return {
        "sums": ", ".join(f"%{number}" for number in range(sums)),
        "weights": ", ".join(f"%{sums + number}" for number in range(4)),
        "operands": sums + 4,
        "outputs": [
            ", ".join(f'"+f"(sums[{tile}][m].sums[{i}])' for i in range(staging.tiles.atom.d.registers))
            for tile in range(staging.block_tiles)
        ],
    }


def float_literal(value: float) -> str:
    """`value` as an exact C++ float literal."""
    return f"{value:g}.0f" if value == int(value) and abs(value) < 1e6 else f"{value.hex()}f"


def power_literal(value: float) -> str:
    """A power of two as a C++ float literal."""
    return f"0x1p{math.frexp(value)[1] - 1}f"
