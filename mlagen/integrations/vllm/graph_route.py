"""The other way into vLLM, MLAGEN_VLLM=graph: the wrapper's forward stays, and a pass rewrites its graph where a decode may be.

A graph has what the pass needs where vLLM does not split it at attention: splitting_ops=[] or use_inductor_graph_partition=True.
"""

import functools
import hashlib
from typing import Any

from mlagen.integrations.vllm.graph import DecodePass, decode_limit, kernels_of, source_digest
from mlagen.integrations.vllm.layer import Ours, prepare_weights
from mlagen.integrations.vllm.layer import install as install_layer
from mlagen.integrations.vllm.log import stand_aside
from mlagen.integrations.vllm.splitting import STOCK_OPERATOR


def install() -> bool:
    """Prepare layers that vLLM makes from now on, and add the pass to its own, once; False where somebody else has the layer."""
    if not install_layer(_prepared):
        return False
    add_pass()
    return True


@functools.cache
def add_pass() -> None:
    """Have vLLM's backend run the pass, for configs and models made from now on.

    - the pass comes last, behind vLLM's fusions and a user's own pass, whose slot in the config stays the user's;
    - the largest number of tokens of a decode step ends a compile range;
    - compiled graphs on disk, which vLLM finds without asking its passes, are named by what they depend on, too.
    """
    from vllm.compilation.backends import VllmBackend
    from vllm.compilation.passes.inductor_pass import InductorPass
    from vllm.config import CompilationConfig, VllmConfig

    backend: Any = VllmBackend
    configs: Any = VllmConfig
    compilation: Any = CompilationConfig
    InductorPass.register(DecodePass)
    configure, set_ranges, compute_hash = backend.configure_post_pass, configs._set_compile_ranges, compilation.compute_hash

    @functools.wraps(configure)
    def configure_post_pass(self: Any) -> None:
        configure(self)
        self.pass_manager.add(DecodePass(self.vllm_config))

    @functools.wraps(set_ranges)
    def set_compile_ranges(self: Any) -> None:
        limit, ends = decode_limit(self), self.compilation_config.compile_ranges_endpoints or []
        if limit not in ends:
            self.compilation_config.compile_ranges_endpoints = [*ends, limit]
        set_ranges(self)

    @functools.wraps(compute_hash)
    def compute_hash_with_kernels(self: Any) -> str:
        kernels = sorted(kernels_of(self.static_forward_context).items())
        return hashlib.sha256(f"{compute_hash(self)} {source_digest()} {kernels}".encode()).hexdigest()

    backend.configure_post_pass = configure_post_pass
    configs._set_compile_ranges = set_compile_ranges
    compilation.compute_hash = compute_hash_with_kernels


def _prepared(base: Any) -> type:
    """The wrapper class that takes the place of `base`: the same, but that its weights are there in mlagen's order, too."""

    class PreparedWrapper(Ours, base):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            from vllm.config import get_current_vllm_config

            base.__init__(self, *args, **options)
            reason = _unseen(get_current_vllm_config().compilation_config)
            if reason is None:
                prepare_weights(self)
            else:
                stand_aside(self.mla_attn.layer_name, reason)

    PreparedWrapper.__name__ = PreparedWrapper.__qualname__ = f"Mlagen{base.__name__}"
    return PreparedWrapper


def _unseen(compilation: Any) -> str | None:
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
