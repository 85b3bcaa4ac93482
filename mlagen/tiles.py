"""The tiles of the q-absorb product: which latent columns, tokens and k a wave multiplies, and in which register each lies."""

from dataclasses import dataclass

from mlagen.errors import ScheduleError
from mlagen.target import MmaAtom

FRAGMENT_BYTES = 16
"""What one lane loads at once: 128 bits, the widest global access."""


@dataclass(frozen=True)
class AbsorbTiles:
    """The tiles of the q-absorb product, with the latent columns on the M side and the tokens on the N side of the atom.

    A chunk is the k range that a wave's 16-byte fragments cover: each lane holds `fragment_k` consecutive k of it, spread over
    `atoms_per_chunk` instructions.  Row m of instruction number i of a tile stands for latent column

        l_tile_first + group(m) * l_run + i * l_held + place(m)

    where group(m) is the group of lanes that holds row m and place(m) its number among the l_held rows that such a lane holds: a
    lane's sums over the `m_tiles` instructions are l_run consecutive latent columns of each of its tokens.
    """

    atom: MmaAtom
    nope_dim: int
    lora_rank: int
    m_tiles: int

    def __post_init__(self) -> None:
        if self.lora_rank % self.l_tile:
            raise ScheduleError(f"l_tile={self.l_tile} does not divide lora_rank={self.lora_rank}: columns would be left over")
        if self.fragment_k % self.atom.b.registers:
            raise ScheduleError(f"{self.atom.builtin}: {self.atom.b.registers} k for each lane do not divide a fragment")
        for fragment, axis in ((self.atom.b, "k"), (self.atom.d, "m")):
            if sum(digit.axis == axis for digit in fragment.lane) != 1:
                raise ScheduleError(f"{self.atom.builtin}: the generated lane arithmetic takes one lane digit along {axis}")
        columns = {self.latent_column(i, m) for i in range(self.m_tiles) for m in range(self.atom.m)}
        if columns != set(range(self.l_tile)):
            raise ScheduleError(f"{self}: the atoms' rows do not cover the latent tile exactly once")

    @property
    def l_tile(self) -> int:
        """Latent columns of one wave."""
        return self.m_tiles * self.atom.m

    @property
    def l_tiles(self) -> int:
        return self.lora_rank // self.l_tile

    @property
    def l_held(self) -> int:
        """Rows of one atom whose sums one lane holds."""
        return self.atom.d.run("m")

    @property
    def l_run(self) -> int:
        """Consecutive latent columns that one lane ends with."""
        return self.m_tiles * self.l_held

    @property
    def fragment_k(self) -> int:
        """k in one fragment of one lane."""
        return FRAGMENT_BYTES // self.atom.element_bytes

    @property
    def atoms_per_chunk(self) -> int:
        return self.fragment_k // self.atom.b.registers

    @property
    def chunk(self) -> int:
        """k covered by one fragment of every lane."""
        return self.atom.k * self.atoms_per_chunk

    @property
    def chunks(self) -> int:
        """Chunks over P; the last one may reach beyond P, where both operands are zero."""
        return -(-self.nope_dim // self.chunk)

    @property
    def padded(self) -> bool:
        return self.nope_dim % self.chunk != 0

    @property
    def token_tile(self) -> int:
        return self.atom.n

    @property
    def tokens_per_lane(self) -> int:
        """Tokens whose sums one lane holds."""
        return self.atom.d.run("n")

    @property
    def weight_fragments(self) -> int:
        """Fragments of one lane that hold the weights of one chunk and m tile."""
        return self.atoms_per_chunk * self.atom.a.registers // self.fragment_k

    @property
    def weight_registers(self) -> int:
        """Registers that one lane's weight tile takes."""
        return self.chunks * self.m_tiles * self.weight_fragments * FRAGMENT_BYTES // 4

    @property
    def registers(self) -> int:
        """Registers of one lane that must be live at once: the weights, one token tile of q, and the sums."""
        return self.weight_registers + self.chunks * FRAGMENT_BYTES // 4 + self.m_tiles * self.atom.d.registers

    def latent_column(self, m_tile: int, m: int) -> int:
        """Latent column, from the tile's first, of row `m` of instruction `m_tile`."""
        group, place = self.atom.d.holder("m", m)
        return group * self.l_run + m_tile * self.l_held + place
