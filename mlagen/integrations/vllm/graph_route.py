"""The other way into vLLM, MLAGEN_VLLM=graph: the wrapper's forward stays, and a pass rewrites its graph where a decode may be.

A graph has what the pass needs where vLLM does not split it at attention: splitting_ops=[] or use_inductor_graph_partition=True.
What rewrites graphs is imported where one is compiled.
"""

import functools
import hashlib
from typing import Any

from mlagen.errors import RequestError
from mlagen.integrations.vllm.plugin import IN_GRAPH, route_of
from mlagen.integrations.vllm.splitting import STOCK_OPERATOR


@functools.cache
def add_pass() -> None:
    """Have vLLM's backend run the pass for models whose configuration asks for it.

    - the pass comes last, behind vLLM's fusions and a user's own pass, whose slot in the config stays the user's;
    - the largest number of tokens of a decode step ends a compile range;
    - compiled graphs on disk, which vLLM finds without asking its passes, are named by what they depend on, too.
    """
    from vllm.compilation.backends import VllmBackend
    from vllm.config import VllmConfig

    backend: Any = VllmBackend
    configs: Any = VllmConfig
    configure, set_ranges, compute_hash = backend.configure_post_pass, configs._set_compile_ranges, configs.compute_hash

    @functools.wraps(configure)
    def configure_post_pass(self: Any) -> None:
        configure(self)
        if _is_rewritten(self.vllm_config):
            from vllm.compilation.passes.inductor_pass import InductorPass

            from mlagen.integrations.vllm.graph import DecodePass

            InductorPass.register(DecodePass)
            self.pass_manager.add(DecodePass(self.vllm_config))

    @functools.wraps(set_ranges)
    def set_compile_ranges(self: Any) -> None:
        if _is_rewritten(self):
            limit, ends = decode_limit(self), self.compilation_config.compile_ranges_endpoints or []
            if limit not in ends:
                self.compilation_config.compile_ranges_endpoints = [*ends, limit]
        set_ranges(self)

    @functools.wraps(compute_hash)
    def compute_hash_with_kernels(self: Any) -> str:
        digest: str = compute_hash(self)
        layers = self.compilation_config.static_forward_context
        if not layers or not _is_rewritten(self):  # a config before its model, in a process that may compile nothing
            return digest
        from mlagen.integrations.vllm.graph import kernels_of, source_digest

        kernels = sorted(kernels_of(layers).items())
        return hashlib.sha256(f"{digest} {source_digest()} {kernels}".encode()).hexdigest()

    backend.configure_post_pass = configure_post_pass
    configs._set_compile_ranges = set_compile_ranges
    configs.compute_hash = compute_hash_with_kernels


def _is_rewritten(config: Any) -> bool:
    try:
        return route_of(config.additional_config) == IN_GRAPH
    except RequestError:
        return False  # said where the config is seen first


def decode_limit(config: Any) -> int:
    """The largest number of tokens of a decode step of a model with this config of vLLM's, which has no range of one token."""
    return max(2, int(config.scheduler_config.max_num_seqs) * (1 + int(config.num_speculative_tokens)))


def why_unseen(compilation: Any) -> str | None:
    """Why no graph that is compiled has a layer's rotation and attention, or None."""
    from vllm.config.compilation import CompilationMode

    if compilation.mode != CompilationMode.VLLM_COMPILE:
        return "MLAGEN_VLLM=graph is for models that vLLM compiles (compilation mode 3); MLAGEN_VLLM=1 is for all"
    if not compilation.use_inductor_graph_partition and STOCK_OPERATOR in (compilation.splitting_ops or []):
        needs = "splitting_ops=[] or use_inductor_graph_partition=True"
        return (
            f"MLAGEN_VLLM=graph needs {needs} in vLLM's compilation config: graphs are split at attention; MLAGEN_VLLM=1 does not"
        )
    return None
