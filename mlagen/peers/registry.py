"""The peers by name, in the order of a table's columns."""

from collections.abc import Mapping
from types import MappingProxyType

from mlagen.errors import RequestError
from mlagen.peers.aiter_hip import BMM_AITER
from mlagen.peers.aiter_triton import AITER_TRITON
from mlagen.peers.compiled import BMM_COMPILE, COMPILE
from mlagen.peers.eager import EAGER
from mlagen.peers.flashinfer import BMM_FLASHINFER
from mlagen.peers.peer import Peer
from mlagen.peers.product import BMM

PEERS: Mapping[str, Peer] = MappingProxyType(
    {peer.name: peer for peer in (EAGER, COMPILE, BMM, BMM_COMPILE, BMM_FLASHINFER, BMM_AITER, AITER_TRITON)}
)


def chosen_peers(names: str) -> list[Peer]:
    """The peers that "all", "none" or names separated by commas stand for, in the table's order.  Raises RequestError."""
    if names in ("all", "none"):
        return list(PEERS.values()) if names == "all" else []
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in PEERS:
            raise RequestError(f"--peers {name!r}: possible are all, none, and of {', '.join(PEERS)} those separated by commas")
    return [peer for name, peer in PEERS.items() if name in wanted]
