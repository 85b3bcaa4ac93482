"""The entry point that vLLM loads in each of its processes, often more than once; it imports neither torch nor vLLM while off."""

import functools
import importlib.metadata
import os
from typing import Any

from mlagen.errors import RequestError

TESTED = ("0.33.0",)
"""Versions of vLLM whose layer was read and tested.  It is no public interface: another version may do anything elsewhere."""

GROUP = "vllm.general_plugins"

VARIABLE = "MLAGEN_VLLM"

CONFIG = "config"
"""What VARIABLE is in a process, and in those that it starts, once a model's configuration has asked for the plugin."""

KEY = "mlagen"
"""What a model's configuration asks with, in vLLM's --additional-config: true, false or IN_GRAPH."""

IN_LAYER = "1"
"""The value of VARIABLE with which layers are replaced."""

IN_GRAPH = "graph"
"""The value of VARIABLE, or of KEY, with which a model's graphs are rewritten, and its layers do as vLLM's."""


def variable() -> str:
    """What MLAGEN_VLLM says: 0, 1, graph, "config", or nothing.  Raises RequestError for another value."""
    text = os.environ.get("MLAGEN_VLLM", "")
    if text not in ("", "0", IN_LAYER, IN_GRAPH, CONFIG):
        raise RequestError(f"{VARIABLE}={text!r}: expected 0 or 1, or {IN_GRAPH}")
    return text


def route_of(additional_config: Any) -> str | None:
    """How a model with this configuration shall decode through mlagen, IN_LAYER or IN_GRAPH, or None: not at all.

    The variable's 0 has the last word.  Raises RequestError for a value of the variable, or of the configuration, that is none.
    """
    text = variable()
    asked = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    if asked is not None and not isinstance(asked, bool) and asked != IN_GRAPH:
        raise RequestError(f"additional_config: {KEY} is {asked!r}, expected true, false or {IN_GRAPH!r}")
    if text == "0" or asked is False:
        return None
    if asked == IN_GRAPH or text == IN_GRAPH:
        return IN_GRAPH
    return IN_LAYER if asked or text == IN_LAYER else None


def is_tested(version: str) -> bool:
    """Whether this is a version of TESTED; what a build adds to it, as in 0.33.0+rocm723, does not matter."""
    return version.partition("+")[0] in TESTED


def register() -> None:
    """Let MLA layers that vLLM builds from now on decode through mlagen, if MLAGEN_VLLM or a model's configuration asks for it.

    With MLAGEN_VLLM=0, does nothing; without the variable, has configurations looked at as they are made, and nothing else.
    Leaves vLLM as it is, with one warning, where its version was not tested, where another plugin has replaced the layer, or where
    a value is none of the possible ones.
    """
    try:
        text = variable()
    except RequestError as error:
        _warn(f"{error}; vLLM stays as it is")
        return
    if text == "0":
        return
    if text != "":
        _install()
    if is_tested(_version()):
        _watch_configs()


def _install() -> None:
    version = _version()
    if not is_tested(version):
        _warn(f"vLLM {version} was not tested with this version of mlagen ({', '.join(TESTED)} was); vLLM stays as it is")
        return
    from mlagen.integrations.vllm.replacement import install

    if not install():
        _warn("another plugin has replaced vLLM's MLA layer; vLLM stays as it is")


def _watch_configs() -> None:
    """Install what a configuration that is made from now on asks for: before it settles where graphs are split."""
    from vllm.config import VllmConfig

    config: Any = VllmConfig
    settle = config.__post_init__
    if hasattr(settle, KEY):
        return

    @functools.wraps(settle)
    def ask_and_settle(self: Any) -> None:
        try:
            route = route_of(self.additional_config)
            if route is not None:
                if variable() == "":
                    os.environ[VARIABLE] = CONFIG  # the processes that run the model get the configuration ready-made
                _install()
            if route == IN_GRAPH:
                from mlagen.integrations.vllm.graph_route import add_pass

                add_pass()
        except RequestError as error:
            _warn(f"{error}; vLLM stays as it is")
        settle(self)

    setattr(ask_and_settle, KEY, True)
    config.__post_init__ = ask_and_settle


def _version() -> str:
    """The version of vLLM, which need not be installed as a package where it runs from its sources."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _warn(text: str) -> None:
    from mlagen.integrations.vllm.log import logger

    logger().warning_once("mlagen: %s", text)
