"""The pass over vLLM's graphs that has mlagen's operator in place of RoPE, cache write and attention of each MLA layer."""

import functools
import hashlib
import operator
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

import mlagen.fx
from mlagen import __version__
from mlagen.fx.index import Unreadable
from mlagen.fx.query import behind
from mlagen.fx.reader import value_of
from mlagen.fx.rewrite import Writer, finish
from mlagen.integrations.vllm.graph_route import decode_limit
from mlagen.integrations.vllm.log import logger, stand_aside
from mlagen.integrations.vllm.site import OUTPUT, Site, find_site, is_dead, layer_of

OURS_OUTPUT = 2
"""Which of a functional call's results is the output of our operator; before it comes the query, which it overwrites."""


@functools.cache
def source_digest() -> str:
    """A hash of what rewrites graphs, and of the operator that it puts there."""
    digest = hashlib.sha256(__version__.encode())
    for folder in (Path(__file__).parent, Path(mlagen.fx.__file__).parent):
        for source in sorted(folder.glob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def kernels_of(layers: dict[str, Any]) -> dict[str, str | None]:
    """For each MLA layer of these the kernel that its decode has, as text, None where it has none."""
    from vllm.model_executor.layers.attention import MLAAttention

    prologues = {name: getattr(layer, "mlagen", None) for name, layer in layers.items() if isinstance(layer, MLAAttention)}
    specs = {name: prologue.spec if prologue is not None else None for name, prologue in prologues.items()}
    return {name: repr(spec) if spec is not None else None for name, spec in specs.items()}


class DecodePass:
    """vLLM's InductorPass in form: it changes graphs for no more tokens than a decode step has.

    Our operator looks at the batch when it runs, so that a short prefill within that range takes vLLM's path.
    """

    def __init__(self, config: Any) -> None:
        """config: vLLM's, whose MLA layers have their weights when a graph is compiled."""
        self.layers: dict[str, Any] = config.compilation_config.static_forward_context
        self.limit = decode_limit(config)

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        return bool(compile_range.end <= self.limit)

    def uuid(self) -> str:
        """What a compiled graph depends on: the sources, the settings, and which layers have which kernel."""
        settings = self.limit, sorted(kernels_of(self.layers).items())
        return hashlib.sha256(f"{source_digest()} {settings}".encode()).hexdigest()

    def __call__(self, graph: fx.Graph) -> None:
        calls = []
        for node in graph.nodes:
            try:
                name = layer_of(node)
            except Unreadable as reason:
                logger().debug("mlagen: left as it is: %s", reason)
                continue
            if name is not None:
                calls.append((node, name))
        found, left = self._sites(calls)
        if found:
            dropped = behind({site.node for site in found}) | {node for node in graph.nodes if is_dead(node)}
            writer = Writer(graph)
            for site in list(found):
                try:
                    _replace(writer, site)
                except Unreadable as reason:
                    found.remove(site)
                    left.append((site.node.name, str(reason)))
            finish(graph, (node for node in dropped if node.op == "call_function"))
        if calls:
            text = "mlagen: in a graph for up to %d tokens decode of %d of %d MLA layers is fused"
            logger().info(text, self.limit, len(found), len(calls))
        if left:
            stand_aside(*left[0])

    def _sites(self, calls: list[tuple[fx.Node, str]]) -> tuple[list[Site], list[tuple[str, str]]]:
        """The sites of these calls, and the other layers that have a kernel, of which the log says that it is ready, with why."""
        kernels, found, left = kernels_of(self.layers), [], []
        named = {name for _, name in calls}
        others = [name for name, kernel in kernels.items() if kernel is None and name not in named]
        for node, name in calls:
            try:
                if kernels.get(name) is None:
                    raise Unreadable(f"{name} has no kernel")
                if isinstance(node.kwargs["layer_name"], fx.Node) and others:
                    raise Unreadable(f"the graph may also run for {others[0]}, which has no kernel")
                prologue = self.layers[name].mlagen
                table = prologue.rotary.cos_sin_cache.shape if prologue.rotary is not None else ()
                found.append(find_site(node, prologue.spec, table))
            except Unreadable as reason:
                logger().debug("mlagen: %s, layer %s: left as it is: %s", node.name, name, reason)
                if kernels.get(name) is not None:
                    left.append((name, f"its graph is not as the wrapper makes it, {reason}"))
        return found, left


def _replace(writer: Writer, site: Site) -> None:
    """Put our operator in a site's place.  Raises Unreadable, and nothing is changed then."""
    with writer.undoing():
        result = _call(functools.partial(writer.emit, site.node), site)
    for user in list(site.node.users):
        assert user.args[1] == OUTPUT
        user.replace_all_uses_with(result)
        writer.graph.erase_node(user)
    logger().debug("mlagen: %s is %s", site.node.name, result.name)


def _call(emit: Any, site: Site) -> fx.Node:
    """Attention's output, by our operator."""
    positions = site.positions
    if positions is None:  # the operator wants some, and without RoPE reads none
        tokens = value_of(site.q).shape[0]
        rows = tokens if isinstance(tokens, int) else emit(torch.ops.aten.sym_size.int, site.q, 0)
        positions = emit(torch.ops.aten.empty.memory_format, [rows], dtype=torch.int64, device=value_of(site.q).device)
    k_pe = site.k_pe if value_of(site.k_pe).dim() == 3 else emit(torch.ops.aten.unsqueeze.default, site.k_pe, 1)
    result = emit(
        auto_functionalized, torch.ops.vllm.mlagen_mla_attention.default, q=site.q, kv_c_normed=site.kv_c, k_pe=k_pe,
        positions=positions, output=site.output, layer_name=site.layer_name,
    )  # fmt: skip
    output: fx.Node = emit(operator.getitem, result, OURS_OUTPUT)
    return output
