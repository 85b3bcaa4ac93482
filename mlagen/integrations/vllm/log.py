"""What is said in vLLM's log, each thing once a process."""

import functools
from typing import Any

_SAID: set[str] = set()


@functools.cache
def logger() -> Any:
    """A logger below vLLM's own, whose handlers and level it has."""
    from vllm.logger import init_logger

    return init_logger("vllm.mlagen")


def stand_aside(layer: str, reason: str) -> None:
    """Say that a layer keeps vLLM's own decode; once for all layers that have the same reason."""
    if reason not in _SAID:
        _SAID.add(reason)
        logger().warning("mlagen: %s, and every layer like it, keeps vLLM's own path: %s", layer, reason)
