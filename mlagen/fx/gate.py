"""For how many rows the passes change a graph."""

import torch

from mlagen.fx.config import FusionConfig
from mlagen.fx.index import Size


def within_limit(tokens: Size, config: FusionConfig) -> bool:
    """Whether a graph's rows are known to be no more than the limit: their number, or the end of a symbol's range."""
    if isinstance(tokens, int):
        return tokens <= config.token_limit
    if config.token_limit == float("inf"):
        return True
    assert isinstance(tokens, torch.SymInt)
    end = tokens.node.shape_env.bound_sympy(tokens.node.expr).upper
    return bool(end.is_Integer) and int(end) <= config.token_limit  # else it is one of sympy's infinities
