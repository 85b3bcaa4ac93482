"""The entry point that vLLM loads in each of its processes, often more than once; it imports neither torch nor vLLM while off."""

import importlib.metadata
import os

from mlagen.errors import RequestError

TESTED = ("0.33.0",)
"""Versions of vLLM whose layer was read and tested.  It is no public interface: another version may do anything elsewhere."""

GROUP = "vllm.general_plugins"


IN_GRAPH = "graph"
"""The value of MLAGEN_VLLM with which graphs are rewritten, and layers stay."""


def switched_on() -> bool:
    """What MLAGEN_VLLM says.  Raises RequestError for a value that is none of 0, 1 and graph."""
    text = os.environ.get("MLAGEN_VLLM", "")
    if text not in ("", "0", "1", IN_GRAPH):
        raise RequestError(f"MLAGEN_VLLM={text!r}: expected 0 or 1, or {IN_GRAPH}")
    return text in ("1", IN_GRAPH)


def is_tested(version: str) -> bool:
    """Whether this is a version of TESTED; what a build adds to it, as in 0.33.0+rocm723, does not matter."""
    return version.partition("+")[0] in TESTED


def register() -> None:
    """Let MLA layers that vLLM builds from now on decode through mlagen, if MLAGEN_VLLM asks for it; otherwise do nothing.

    Leaves vLLM as it is, with one warning, where its version was not tested, where another plugin has replaced the layer, or where
    the variable has another value.
    """
    try:
        if not switched_on():
            return
    except RequestError as error:
        _warn(f"{error}; vLLM stays as it is")
        return
    version = _version()
    if not is_tested(version):
        _warn(f"vLLM {version} was not tested with this version of mlagen ({', '.join(TESTED)} was); vLLM stays as it is")
        return
    if os.environ["MLAGEN_VLLM"] == IN_GRAPH:
        from mlagen.integrations.vllm.graph_route import install
    else:
        from mlagen.integrations.vllm.layer import install

    if not install():
        _warn("another plugin has replaced vLLM's MLA layer; vLLM stays as it is")


def _version() -> str:
    """The version of vLLM, which need not be installed as a package where it runs from its sources."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _warn(text: str) -> None:
    from mlagen.integrations.vllm.log import logger

    logger().warning_once("mlagen: %s", text)
