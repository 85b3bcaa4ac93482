"""The order in which W_UK lies in memory: exactly the order in which lanes consume it.

A packed head is a row of tiles; a tile is a row of fragments; a fragment is 16 consecutive bytes for each lane of a wave.  A wave
reads a fragment with one coalesced 128-bit load per lane, straight into the registers of the matrix instruction.
"""

import functools

import numpy as np
import numpy.typing as npt

from mlagen.errors import ScheduleError
from mlagen.tiles import AbsorbTiles

PADDING = -1
"""Marks a packed element beyond P: zero, whatever the weights are."""


def packed_shape(tiles: AbsorbTiles) -> tuple[int, int, int, int, int, int]:
    """(latent tiles, chunks, m tiles, fragments, lanes, elements of a fragment) of one packed head."""
    return (tiles.l_tiles, tiles.chunks, tiles.m_tiles, tiles.weight_fragments, tiles.atom.lanes, tiles.fragment_k)


@functools.cache
def packing_index(tiles: AbsorbTiles) -> npt.NDArray[np.int64]:
    """For each element of a packed head, its place p * L + l in the head's [P,L] weights, or PADDING.

    Raises ScheduleError if a weight were left out or taken twice: the proof of the packing.
    """
    atom = tiles.atom
    index = np.full(packed_shape(tiles), PADDING, dtype=np.int64)
    latent_first = np.arange(tiles.l_tiles) * tiles.l_tile
    for m_tile in range(tiles.m_tiles):
        for lane in range(atom.lanes):
            for element in range(tiles.weight_fragments * tiles.fragment_k):
                instruction, register = divmod(element, atom.a.registers)
                fragment, place = divmod(element, tiles.fragment_k)
                column = tiles.latent_column(m_tile, atom.a.coordinate("m", lane, register))
                k = fragment_k_position(tiles, atom.a.coordinate("k", lane, register), instruction)
                for chunk in range(tiles.chunks):
                    p = chunk * tiles.chunk + k
                    if p < tiles.nope_dim:
                        index[:, chunk, m_tile, fragment, lane, place] = p * tiles.lora_rank + latent_first + column
    flat = index.reshape(-1)
    taken = np.sort(flat[flat != PADDING])
    if not np.array_equal(taken, np.arange(tiles.nope_dim * tiles.lora_rank)):
        raise ScheduleError(f"{tiles}: packing does not take every weight exactly once")
    flat.setflags(write=False)  # all callers share it
    return flat


def fragment_k_position(tiles: AbsorbTiles, atom_k: int, instruction: int) -> int:
    """Place within a chunk of the atom's k number `atom_k` in the chunk's instruction number `instruction`.

    The product may sum k in any order, so each lane takes fragment_k consecutive k of q: one 16-byte load.
    """
    group, held = tiles.atom.b.holder("k", atom_k)
    return group * tiles.fragment_k + instruction * tiles.atom.b.registers + held
