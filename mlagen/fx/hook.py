"""The passes in Inductor."""

import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch._inductor.config as inductor
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from mlagen import __version__
from mlagen.fx.config import FusionConfig
from mlagen.fx.fuse import FuseProloguePass
from mlagen.fx.lift import LiftQPrepPass
from mlagen.fx.report import GraphReport, collected_reports, collected_sites, publish

logger = logging.getLogger(__name__)


class ProloguePasses(CustomGraphPass):
    """Inductor's post-grad custom post pass: what a config asks for, after the pass that was there before, if any.

    torch._inductor.config.post_grad_custom_post_pass = ProloguePasses(FusionConfig(enabled=True))
    """

    gives_way = False
    """Whether another such pass takes the place of this one, and does not come after it."""

    def __init__(self, config: FusionConfig, earlier: Any = None) -> None:
        self.config = config
        self.earlier: Any = earlier.earlier if isinstance(earlier, ProloguePasses) and earlier.gives_way else earlier
        self.passes = (
            *((FuseProloguePass(config),) if config.enabled and config.fuse else ()),
            *((LiftQPrepPass(config),) if config.enabled and config.lift else ()),
        )

    def __call__(self, graph: fx.Graph) -> None:
        if self.earlier is not None:
            self.earlier(graph)
        for each in self.passes:
            before, start = len(graph.nodes), time.perf_counter()
            with collected_sites() as sites:
                count = each(graph)
            seconds, name = time.perf_counter() - start, type(each).__name__
            publish(GraphReport(name, count, before, len(graph.nodes), seconds, tuple(sites)))
            logger.info("%s: %d in a graph of %d nodes", name, count, len(graph.nodes))

    def uuid(self) -> object:
        """What a compiled graph in Inductor's cache depends on: the sources, the settings, the earlier pass; None: do not cache."""
        earlier = None
        if self.earlier is not None:
            earlier = self.earlier.uuid() if isinstance(self.earlier, CustomGraphPass) else None
            if earlier is None:
                return None
        digest = hashlib.sha256()
        for source in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(source.read_bytes())
        return ("mlagen", __version__, digest.hexdigest(), dataclasses.astuple(self.config), earlier)


class _Explained(ProloguePasses):
    gives_way = True

    def uuid(self) -> None:
        """A graph from Inductor's cache would have nothing to tell."""


@contextlib.contextmanager
def explained(config: FusionConfig) -> Iterator[list[GraphReport]]:
    """Compile with the passes inside of this context, and tell what they did to each graph.

    Where the program in it asks for passes itself, these take the place of the context's.
    """
    passes = _Explained(config, inductor.post_grad_custom_post_pass)
    with collected_reports() as found, inductor.patch(post_grad_custom_post_pass=passes, fx_graph_cache=False):
        yield found


@contextlib.contextmanager
def fused_prologue(config: FusionConfig) -> Iterator[None]:
    """Compile with the passes inside of this context; what was compiled then stays fused.

    Compiling happens at the first call of a compiled function, so that call belongs in here.
    """
    earlier = inductor.post_grad_custom_post_pass
    if not config.enabled:
        yield
        return
    with inductor.patch(post_grad_custom_post_pass=ProloguePasses(config, earlier)):
        yield


def install(config: FusionConfig) -> None:
    """Compile with the passes from now on, in this process; with a config that is not enabled, without them."""
    current = inductor.post_grad_custom_post_pass
    earlier = current.earlier if isinstance(current, ProloguePasses) else current
    inductor.post_grad_custom_post_pass = ProloguePasses(config, earlier) if config.enabled else earlier
