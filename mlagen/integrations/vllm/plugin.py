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
"""What a model's configuration asks with, in vLLM's --additional-config: true or false."""


def variable() -> str:
    """What MLAGEN_VLLM says: 0, 1, "config", or nothing.  Raises RequestError for another value."""
    text = os.environ.get("MLAGEN_VLLM", "")
    if text not in ("", "0", "1", CONFIG):
        raise RequestError(f"{VARIABLE}={text!r}: expected 0 or 1")
    return text


def is_wanted(additional_config: Any) -> bool:
    """Whether a model with this configuration shall decode through mlagen; the variable's 0 has the last word.

    Raises RequestError for a value of the variable, or of the configuration, that is none.
    """
    text = variable()
    asked = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    if asked is not None and not isinstance(asked, bool):
        raise RequestError(f"additional_config: {KEY} is {asked!r}, expected true or false")
    return text != "0" and (text == "1" if asked is None else asked)


def is_tested(version: str) -> bool:
    """Whether this is a version of TESTED; what a build adds to it, as in 0.33.0+rocm723, does not matter."""
    return version.partition("+")[0] in TESTED


def register() -> None:
    """Let MLA layers that vLLM builds from now on decode through mlagen, if MLAGEN_VLLM=1 or a model's configuration asks for it.

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
    if text == "":
        if is_tested(_version()):
            _watch_configs()
        return
    _install()


def _install() -> None:
    version = _version()
    if not is_tested(version):
        _warn(f"vLLM {version} was not tested with this version of mlagen ({', '.join(TESTED)} was); vLLM stays as it is")
        return
    from mlagen.integrations.vllm.replacement import install

    if not install():
        _warn("another plugin has replaced vLLM's MLA layer; vLLM stays as it is")


def _watch_configs() -> None:
    """Install where a configuration that is made from now on asks for it: before it settles where graphs are split."""
    from vllm.config import VllmConfig

    config: Any = VllmConfig
    settle = config.__post_init__
    if hasattr(settle, KEY):
        return

    @functools.wraps(settle)
    def ask_and_settle(self: Any) -> None:
        try:
            if is_wanted(self.additional_config):
                if variable() == "":
                    os.environ[VARIABLE] = CONFIG  # the processes that run the model get the configuration ready-made
                _install()
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
