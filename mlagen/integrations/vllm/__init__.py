"""vLLM's MLA decode on mlagen's kernels, as a plugin: vLLM finds `register` by itself, and MLAGEN_VLLM=1 switches it on.

docs/vllm.md says what is replaced, what is not, and how to see which.
"""

from mlagen.integrations.vllm.plugin import register

__all__ = ["register"]
