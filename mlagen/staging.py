"""Staging: the query of a workgroup's tokens in shared memory, for waves that multiply blocks of tokens from it.

The product reads B in octets: 8 consecutive k of 8 tokens, 16 bytes of a token after those of the one before.  Its k are those of
the matrix instructions, and the packing of the weights has given them to the lanes such that a lane's fragment of q is 16
consecutive bytes; so the four words of a fragment belong to four octets, in each to the place of the lane's group.
"""

from dataclasses import dataclass

from mlagen.errors import ScheduleError
from mlagen.tiles import FRAGMENT_BYTES, AbsorbTiles

OCTET = 8
WORD_BYTES = 4


@dataclass(frozen=True)
class Staging:
    """The query in blocks of `block` tokens, multiplied by `group` waves together; these also write finished rows together.

    `out_bytes` is the size of an element of the output, `shared_limit` the bytes of shared memory that a workgroup may have.
    """

    tiles: AbsorbTiles
    block: int
    group: int
    out_bytes: int
    shared_limit: int

    def __post_init__(self) -> None:
        tiles = self.tiles
        if self.block % tiles.token_tile or tiles.token_tile != OCTET:
            raise ScheduleError(f"block={self.block}: a block is made of tiles of {OCTET} tokens, not of {tiles.token_tile}")
        if tiles.l_tiles % self.group:
            raise ScheduleError(f"{tiles.l_tiles} latent tiles of a head: {self.group} waves multiply together")
        places = set()
        for instruction in range(tiles.atoms_per_chunk):
            for k in range(tiles.atom.k):
                group, held = tiles.atom.b.holder("k", k)
                p = group * tiles.fragment_k + instruction * tiles.atom.b.registers + held
                octet, place = divmod(instruction * tiles.atom.k + k, OCTET)
                if self.place(0, p) != octet * self.octet_bytes + 2 * place:
                    raise ScheduleError(f"{tiles.atom.builtin}: k={k} is not where the staged query has it")
                places.add(p)
        if places != set(range(tiles.chunk)):
            raise ScheduleError(f"{self}: the staged query does not hold every k once")

    @property
    def octet_bytes(self) -> int:
        """From one octet to the next along k: 128 bytes of data, and 16 that spread the words of a fragment over the banks."""
        return OCTET * FRAGMENT_BYTES + 16

    @property
    def tile_bytes(self) -> int:
        """From one token tile to the next."""
        return self.octet_bytes * self.tiles.chunks * self.tiles.chunk // OCTET

    @property
    def fragments(self) -> int:
        """Fragments of one token, those beyond P, which are zero, among them."""
        return self.tiles.chunks * self.tiles.chunk // self.tiles.fragment_k

    @property
    def chunk_fragments(self) -> int:
        return self.tiles.chunk // self.tiles.fragment_k

    @property
    def block_tiles(self) -> int:
        """Token tiles of a block."""
        return self.block // OCTET

    @property
    def chunk_bytes(self) -> int:
        """From one chunk to the next."""
        return self.chunk_fragments * self.octet_bytes

    @property
    def octet_step(self) -> int:
        """From one octet to the next along k, in the descriptor's units."""
        return self.octet_bytes // FRAGMENT_BYTES

    @property
    def tile_step(self) -> int:
        """From one token tile to the next, in the descriptor's units."""
        return self.tile_bytes // FRAGMENT_BYTES

    @property
    def octets_per_atom(self) -> int:
        """Octets that one instruction multiplies."""
        return self.tiles.atom.k // OCTET

    @property
    def row_bytes(self) -> int:
        """What a group of waves has of a row of the output."""
        return self.group * self.tiles.l_tile * self.out_bytes

    @property
    def row_stride(self) -> int:
        """Rows in shared memory are 16 bytes apart from a multiple of all banks."""
        return self.row_bytes + 16

    @property
    def rows_bytes(self) -> int:
        """A block of finished rows."""
        return self.block * self.row_stride

    def place(self, token: int, p: int) -> int:
        """Byte offset of element `p` of staged token number `token`."""
        fragment, element = divmod(p, self.tiles.fragment_k)
        chunk, lane = divmod(fragment, self.chunk_fragments)
        word, half = divmod(element, 2)
        octet = chunk * self.chunk_fragments + word
        tile, row = divmod(token, OCTET)
        return tile * self.tile_bytes + octet * self.octet_bytes + row * FRAGMENT_BYTES + lane * WORD_BYTES + 2 * half

    def shared_bytes(self, token_tiles: int, waves: int) -> int:
        """Shared memory of a workgroup of `waves` waves that takes `token_tiles` tiles: q, and two blocks of rows for a group."""
        return token_tiles * self.tile_bytes + waves // self.group * 2 * self.rows_bytes

    def whole_blocks(self, token_tiles: int, waves: int) -> int:
        """`token_tiles` rounded up to whole blocks, and down to what shared memory holds."""
        room = (self.shared_limit - self.shared_bytes(0, waves)) // (self.block_tiles * self.tile_bytes)
        return max(0, min(-(-token_tiles // self.block_tiles), room)) * self.block_tiles
