"""Packed codes: W_UK in fp8 or e2m1 in the order in which lanes consume it, with the scales of a head behind its codes.

A lane loads 16 bytes at a time, which hold the codes of two or four fragments, and makes fragments of them in registers.  Within a
word the codes lie where a platform takes them apart with the fewest operations.
"""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlagen.dtypes import DType
from mlagen.errors import ScheduleError
from mlagen.lowering import Lowered
from mlagen.packing import PADDING, packed_shape, packing_index
from mlagen.schedule import Schedule
from mlagen.target import Target
from mlagen.tiles import FRAGMENT_BYTES, AbsorbTiles

WORD_BYTES = 4
LOAD_WORDS = FRAGMENT_BYTES // WORD_BYTES

NIBBLE_ORDER = {
    # All low nibbles of a word at once, then all high ones: four bytes each.
    "amd": (0, 4, 1, 5, 2, 6, 3, 7),
    # A nibble of both halves at once: an element in each.
    "nvidia": (0, 2, 4, 6, 1, 3, 5, 7),
}
"""For each platform: which of a word's eight consecutive codes lies in its lowest nibble, in the next and so on."""

HEAD_ALIGNMENT = 256
"""A packed head starts at a multiple of what the memory is read in at once."""

LARGEST_EXPONENT = 253
"""The byte of a head's largest e8m0 scale in a packed head, where a byte means 2^(byte - 253); the rest is the head's factor."""

SMALLEST_EXPONENT = 128
"""The smallest such byte: a code times its scale is then a normal bf16, and so is every number on the way there."""


@dataclass(frozen=True)
class PackedCodes:
    """How the codes of W_UK and their scales lie in memory, for one head; all numbers are of bytes unless they say otherwise.

    `block` says how many rows and columns share a scale.  `operand_codes` is set where the matrix instruction takes the codes as
    they are.
    """

    tiles: AbsorbTiles
    code: DType
    block: tuple[int, int]
    order: tuple[int, ...]
    operand_codes: bool

    def __post_init__(self) -> None:
        rows, columns = self.block
        if rows < self.tiles.nope_dim and rows % self.tiles.chunk:
            raise ScheduleError(f"scales of {rows} rows of W_UK: a wave multiplies {self.tiles.chunk} at a time")
        if 1 < columns < self.tiles.lora_rank and columns % self.tiles.l_tile:
            raise ScheduleError(f"scales of {columns} columns of W_UK: a wave has {self.tiles.l_tile} of them")
        if self.by_column and rows != self.tiles.chunk:
            raise ScheduleError(f"scales of {rows} rows of one column: a wave multiplies {self.tiles.chunk} at a time")

    @property
    def largest_exponent(self) -> int:
        return LARGEST_EXPONENT

    @property
    def bits(self) -> int:
        return self.code.value.bits

    @property
    def by_column(self) -> bool:
        """Whether each latent column has scales of its own, which meet the codes; others meet the sums."""
        return self.block[1] == 1

    @property
    def per_word(self) -> int:
        """Codes of a word."""
        return 8 * WORD_BYTES // self.bits

    @property
    def per_load(self) -> int:
        """Codes that a lane loads at once."""
        return 8 * FRAGMENT_BYTES // self.bits

    @property
    def lane_codes(self) -> int:
        """Codes of one lane's weight tile."""
        tiles = self.tiles
        return tiles.chunks * tiles.m_tiles * tiles.weight_fragments * tiles.fragment_k

    @property
    def loads(self) -> int:
        """Loads of one lane for its weight tile."""
        return -(-self.lane_codes // self.per_load)

    @property
    def scales_at(self) -> int:
        """Where the scales start: behind the codes of all tiles."""
        return self.tiles.l_tiles * self.loads * self.tiles.atom.lanes * FRAGMENT_BYTES

    @property
    def row_blocks(self) -> int:
        """Blocks of rows whose sums have scales of their own."""
        return 1 if self.by_column else -(-self.tiles.nope_dim // self.block[0])

    @property
    def column_blocks(self) -> int:
        return -(-self.tiles.lora_rank // self.block[1])

    @property
    def tiles_per_block(self) -> int:
        """Latent tiles whose sums have the same scale."""
        return max(1, self.block[1] // self.tiles.l_tile)

    @property
    def block_chunks(self) -> int:
        """Chunks whose sums have the same scale."""
        return self.tiles.chunks // self.row_blocks

    @property
    def rows_held(self) -> int:
        """Rows of the atom's weights, latent columns, that one lane holds."""
        return self.tiles.atom.a.run("m")

    @property
    def scale_words(self) -> int:
        """Words that hold a lane's e8m0 scales, a byte for each chunk, m tile and row; it loads 4, 8 or 16 bytes at once."""
        words = -(-self.tiles.chunks * self.tiles.m_tiles * self.rows_held // WORD_BYTES)
        return words if words <= 2 else -(-words // LOAD_WORDS) * LOAD_WORDS

    @property
    def exponents_at(self) -> int:
        """Where the e8m0 scales start: behind the head's factor, which has a load of its own."""
        return self.scales_at + FRAGMENT_BYTES

    @property
    def tile_exponents(self) -> int:
        """The e8m0 scales of one latent tile: lanes that hold the same rows share theirs."""
        return self.tiles.atom.a.groups("m") * self.scale_words * WORD_BYTES

    @property
    def head_bytes(self) -> int:
        """From one packed head to the next."""
        if self.by_column:
            end = self.exponents_at + self.tiles.l_tiles * self.tile_exponents
        else:
            end = self.scales_at + self.row_blocks * self.column_blocks * DType.FP32.bytes
        return -(-end // HEAD_ALIGNMENT) * HEAD_ALIGNMENT

    @functools.cached_property
    def code_index(self) -> npt.NDArray[np.int64]:
        """For each code of a packed head, lowest in its byte first, its place p * L + l in [P,L], or PADDING."""
        tiles = self.tiles
        by_lane = packing_index(tiles).reshape(tiles.l_tiles, -1, tiles.atom.lanes, tiles.fragment_k).transpose(0, 2, 1, 3)
        shape = (tiles.l_tiles, tiles.atom.lanes, self.loads * self.per_load)
        lanes = np.full(shape, PADDING, dtype=np.int64)
        lanes[..., : self.lane_codes] = by_lane.reshape(tiles.l_tiles, tiles.atom.lanes, -1)
        words = lanes.reshape(tiles.l_tiles, tiles.atom.lanes, self.loads, -1, self.per_word)
        index: npt.NDArray[np.int64] = np.take(words, self.order, axis=-1).transpose(0, 2, 1, 3, 4).reshape(-1)
        return index

    @functools.cached_property
    def exponent_index(self) -> npt.NDArray[np.int64]:
        """For each e8m0 scale of a packed head its place in [P/32, L], or PADDING."""
        tiles, a = self.tiles, self.tiles.atom.a
        shape = (tiles.l_tiles, a.groups("m"), self.scale_words * WORD_BYTES)
        index = np.full(shape, PADDING, dtype=np.int64)
        first = np.arange(tiles.l_tiles) * tiles.l_tile
        for m in range(tiles.atom.m):
            group, held = a.holder("m", m)
            for m_tile in range(tiles.m_tiles):
                column = tiles.latent_column(m_tile, m)
                for chunk in range(tiles.chunks):
                    place = (chunk * tiles.m_tiles + m_tile) * self.rows_held + held
                    index[:, group, place] = chunk * tiles.lora_rank + first + column
        return index.reshape(-1)


@functools.cache
def packed_codes(lowered: Lowered, schedule: Schedule, target: Target) -> PackedCodes | None:
    """How the kernel of a schedule finds W_UK, where it comes in codes; None where it comes in the model's dtype."""
    absorb, tiles = lowered.absorb, schedule.absorb
    if absorb is None or tiles is None or absorb.scale_block is None:
        return None
    operand = lowered.operand_dtype is not lowered.model_dtype
    order = (0, 1, 2, 3) if absorb.weight.is_fp8 else NIBBLE_ORDER[target.platform]
    return PackedCodes(tiles, absorb.weight, absorb.scale_block, order, operand)


def packed_head_shape(tiles: AbsorbTiles, codes: PackedCodes | None) -> tuple[int, ...]:
    """Shape of one packed head: elements of the model's dtype in the order of packing_index, or bytes."""
    return packed_shape(tiles) if codes is None else (codes.head_bytes,)
