"""What vLLM's compilation must know of our operator."""

import functools
import hashlib
from typing import Any

from mlagen import __version__
from mlagen.errors import RequestError
from mlagen.integrations.vllm.plugin import route_of

OPERATOR = "vllm::mlagen_mla_attention"

STOCK_OPERATOR = "vllm::unified_mla_attention_with_output"
"""The operator in whose place ours runs."""


def announce_operator() -> None:
    """Make OPERATOR one of those at which vLLM splits a model's graph, and a compiled graph with it one of another name.

    Three things in vLLM's configs, for those made from now on:
    - the list of attention operators, from which splitting_ops comes where a user gives none;
    - a user's own splitting_ops: vLLM takes a list without one of the attention operators for one without attention, and drops
      piecewise graphs.  Where it has vLLM's MLA operator, ours goes beside it;
    - the hash that names compiled graphs on disk: which operators they call depends on the plugin, and on the model's route. The
      variable says as much of that as the configuration does, and what vLLM hashes has no trace of it.
    """
    from vllm.config import CompilationConfig, VllmConfig

    config: Any = CompilationConfig
    whole: Any = VllmConfig
    if OPERATOR in config._attention_ops:
        return
    config._attention_ops.append(OPERATOR)
    set_splitting_ops, compute_hash = config.set_splitting_ops_for_v1, whole.compute_hash

    @functools.wraps(set_splitting_ops)
    def set_splitting_ops_for_v1(self: Any, *args: Any, **options: Any) -> Any:
        if self.splitting_ops and STOCK_OPERATOR in self.splitting_ops and OPERATOR not in self.splitting_ops:
            self.splitting_ops = [*self.splitting_ops, OPERATOR]
        return set_splitting_ops(self, *args, **options)

    @functools.wraps(compute_hash)
    def compute_hash_with_mlagen(self: Any) -> str:
        try:
            route = route_of(self.additional_config)
        except RequestError:
            route = None  # the layers are vLLM's, see plugin.register
        return hashlib.sha256(f"{compute_hash(self)} mlagen {__version__} {route}".encode()).hexdigest()

    config.set_splitting_ops_for_v1 = set_splitting_ops_for_v1
    whole.compute_hash = compute_hash_with_mlagen
