"""Puts our classes where vLLM looks for replacements of its layers, as soon as it has the layers, and no earlier.

Importing them brings five hundred modules, AITER's among them, into processes that only pass requests on, or that have yet to fork.
"""

from typing import Any

from mlagen.integrations.vllm.splitting import announce_operator

WRAPPER = "MultiHeadLatentAttentionWrapper"

KIMI_K3_WRAPPER = "KimiK3MultiHeadLatentAttentionWrapper"
"""A subclass with a forward of its own, in a module that only its model imports."""

MARK = "mlagen"


def install() -> bool:
    """Replace the classes of MLA wrappers that vLLM makes from now on, once; False where somebody else has replaced one."""
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

    layer: Any = PluggableLayer
    if hasattr(layer, MARK):
        return True
    if WRAPPER in op_registry_oot:
        return False
    announce_operator()
    for cls in _descendants(layer):
        _adopt(cls)

    def adopt(cls: Any, /, **options: Any) -> None:
        super(layer, cls).__init_subclass__(**options)
        _adopt(cls)

    layer.__init_subclass__ = classmethod(adopt)
    setattr(layer, MARK, True)
    return True


def _descendants(cls: Any) -> list[Any]:
    children: list[Any] = cls.__subclasses__()
    return children + [each for child in children for each in _descendants(child)]


def _adopt(cls: Any) -> None:
    """Replace this class, where it is one of the wrappers."""
    from vllm.model_executor.custom_op import op_registry_oot

    is_vllms = cls.__name__ in (WRAPPER, KIMI_K3_WRAPPER) and cls.__module__.startswith("vllm.")
    if is_vllms and cls.__name__ not in op_registry_oot:
        from mlagen.integrations.vllm.layer import fused

        cls.register_oot(fused(cls))
