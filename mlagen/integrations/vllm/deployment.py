"""The kernels that a deployment of vLLM may ask for, known from its command line, for building them beforehand; needs no vLLM."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from mlagen.dtypes import DType
from mlagen.errors import RequestError
from mlagen.integrations.vllm.command import Command, parse_command
from mlagen.models import PRESETS, ModelShape, heads_per_rank, resolve_model
from mlagen.shipped import Request
from mlagen.spec import PrologueSpec
from mlagen.target import Target

STATIC_QUANT_LIMIT_FNUZ = 224.0
"""Where vLLM's static quantiser clamps e4m3fnuz, whose own limit is 240."""

AITER_HEADS = 16
"""AITER's MLA decode takes query heads in multiples of this; fewer may also go to its Gluon kernels, to which vLLM hands a pair."""

FP8_CACHES = ("fp8", "fp8_e4m3")

BACKENDS = ("ROCM_AITER_MLA", "TRITON_MLA")
"""Attention that was tested behind a kernel, by vLLM's names of it."""

SPARSE = ("deepseek-v3.2", "glm-5", "glm5-next")
"""Presets whose attention is sparse, which vLLM keeps for itself."""

ALIASES = {
    "deepseek-v3.1": "deepseek-v3",
    "kimi-k2.5": "kimi-k2",
    "kimi-linear-48b-a3b": "kimi-linear",
    "mistral-large-3-675b": "mistral-large-3",
    "glm-4.7-flash": "glm-4.7-lite",
    "minicpm3-4b": "minicpm3",
    "a.x-k1": "ax-k1",
}
"""Published names of presets, where they are others."""

_EDITIONS = r"(-(instruct|chat|base|thinking|terminus|zero|preview|bf16|fp8|mxfp4|nvfp4|awq|kv|[0-9]{4}))*$"
"""What follows a model's name where its shape is the same: how it was trained, in what its experts are quantised, and when."""


def fp8_limit(q_dtype: str, target: Target) -> float | None:
    """A spec's fp8_max for a query of this type; the cache's entries, which vLLM writes up to the format's own limit, share it."""
    return STATIC_QUANT_LIMIT_FNUZ if q_dtype == "fp8" and target.fp8 is DType.E4M3FNUZ else None


def is_pair(q_dtype: str, heads: int, rope_dim: int) -> bool:
    """Whether AITER's attention gets this query as two tensors."""
    return q_dtype != "fp8" and heads < AITER_HEADS and rope_dim > 0


def deployment_requests(text: str, targets: list[Target]) -> list[Request]:
    """Every kernel that a layer of a deployment may load on one of these targets; all of its ranks ask for the same ones.

    `text` is a command line of `vllm serve`, see parse_command.  What it leaves open counts in each of its forms: the attention
    backend, which vLLM chooses on the machine; the type of the cache, which a checkpoint may choose where the command has "auto".

    Raises RequestError where the command cannot be read or is one of those for which the plugin stands aside, ModelError where
    the model is not known or the number of ranks does not fit it, SpecError where no kernel can be made of it.
    """
    command = parse_command(text)
    name = preset_name(command.model) or command.model
    shape = resolve_model(name)
    if _is_sparse(name):
        raise RequestError(f"--vllm-args: {command.model} has sparse attention, and its layers keep vLLM's own path")
    if command.dtype is not None:
        shape = replace(shape, dtype=command.dtype)
    specs = [(target, spec) for target in targets for spec in _specs(command, shape, target)]
    for target, spec in specs:
        spec.program(target)
    return [Request(shape.name, command.tp, spec, target) for target, spec in specs]


@dataclass(frozen=True)
class Outputs:
    """Types of a kernel's outputs, in a spec's words."""

    q_dtype: str
    kv_dtype: str
    q_split: bool = False


def _specs(command: Command, shape: ModelShape, target: Target) -> list[PrologueSpec]:
    heads = heads_per_rank(shape, command.tp)
    return [
        PrologueSpec.of_shape(
            shape,
            command.tp,
            weight=weight,
            q_dtype=outputs.q_dtype,
            kv_dtype=outputs.kv_dtype,
            fp8_max=fp8_limit(outputs.q_dtype, target),
            q_split=outputs.q_split,
        )
        for weight in _weights(command, shape, target)
        for outputs in dict.fromkeys(_outputs(command, shape, heads))
    ]


def _weights(command: Command, shape: ModelShape, target: Target) -> list[str | None]:
    """Types of W_UK, AITER's by the variables that ask for them; its fp4 is for gfx950 and for weights that are in bf16."""
    plain = "fp8" if command.variable("VLLM_ROCM_USE_AITER_FP8BMM") else None
    has_fp4 = command.variable("VLLM_ROCM_USE_AITER_FP4BMM") and target.arch == "gfx950" and shape.dtype == "bf16"
    return ["mxfp4", plain] if has_fp4 else [plain]


def _outputs(command: Command, shape: ModelShape, heads: int) -> list[Outputs]:
    """What each attention backend takes beside each type of cache, as choice.choose has it."""
    names = {"bf16": "bfloat16", "fp16": "float16"}
    cache, own = command.kv_cache_dtype, names[shape.dtype]
    if cache not in ("auto", own, *FP8_CACHES):
        allowed = ", ".join(("auto", own, *FP8_CACHES))
        raise RequestError(
            f"--vllm-args: --kv-cache-dtype {cache} keeps vLLM's own path; with a model in {own} mlagen takes {allowed}"
        )
    if command.backend not in (None, *BACKENDS):
        known = " and ".join(BACKENDS)
        raise RequestError(f"--vllm-args: --attention-backend {command.backend} keeps vLLM's own path; {known} were tested")
    found = []
    for backend in BACKENDS if command.backend is None else (command.backend,):
        is_aiter = backend == "ROCM_AITER_MLA"
        if cache == "auto" or cache in FP8_CACHES:
            found.append(Outputs("fp8" if is_aiter else shape.dtype, "fp8"))
        if cache not in FP8_CACHES:
            found.append(Outputs(shape.dtype, shape.dtype, is_aiter and is_pair(shape.dtype, heads, shape.rope_dim)))
    return found


def preset_name(model: str) -> str | None:
    """The preset that a repository such as deepseek-ai/DeepSeek-R1-0528 has; None for a path, or where no preset is known."""
    if Path(model).exists():
        return None
    name = re.sub(_EDITIONS, "", model.rpartition("/")[2].lower())
    name = ALIASES.get(name, name)
    return name if name in PRESETS else None


def _is_sparse(name: str) -> bool:
    """Whether vLLM takes a model, a preset or a path, for one with sparse attention: its config has an index_topk then."""
    if name in PRESETS:
        return name in SPARSE
    path = Path(name)
    if path.is_dir():  # Mistral's own format has no word for it
        path = path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8-sig")) if path.exists() else {}
    return any(isinstance(part, dict) and "index_topk" in part for part in (config, *config.values()))
