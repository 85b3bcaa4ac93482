"""What a command line of `vllm serve` says of the kernels that it needs."""

import argparse
import re
import shlex
from dataclasses import dataclass
from typing import NoReturn

from mlagen.errors import RequestError

OPTION = "--vllm-args"

DTYPES = {"auto": None, "bfloat16": "bf16", "half": "fp16", "float16": "fp16"}

ALONE = {
    "decode_context_parallel_size": "decode context parallelism gathers the query and splits the cache",
    "prefill_context_parallel_size": "prefill context parallelism splits the cache",
}
"""Options under which every layer keeps vLLM's own path unless they are 1, and why."""

UNREAD = {
    "config": "write the options in that file out",
    "hf_config_path": "name the folder of that config.json as the model",
    "hf_overrides": "put them into a config.json, and name its folder as the model",
}
"""Options that change what is read elsewhere, and what to do instead."""


@dataclass(frozen=True)
class Command:
    """The part of a command line that matters.

    model           a repository's name or a path
    tp              tensor-parallel ranks
    dtype           "bf16" or "fp16"; None: as the model's config says
    kv_cache_dtype  as vLLM spells it; "auto" where nothing is said
    backend         vLLM's name of the attention; None where nothing is said
    variables       those in front of the command
    """

    model: str
    tp: int
    dtype: str | None
    kv_cache_dtype: str
    backend: str | None
    variables: frozenset[tuple[str, str]]

    def variable(self, name: str) -> bool:
        """Whether one of AITER's switches is on, and AITER with it."""
        values = dict(self.variables)
        return all(values.get(each, "0").lower() in ("1", "true") for each in ("VLLM_ROCM_USE_AITER", name))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{OPTION}: {message}; write it as for `vllm serve`")


def parse_command(text: str) -> Command:
    """Read what follows `vllm serve`, or the whole command with the variables in front of it.

    Options that have nothing to do with the kernels are passed over.  As it is not known which of them take a value, the model
    comes first, or behind --model.  Raises RequestError.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RequestError(f"{OPTION}: {str(error).lower()}; check its quotes") from None
    variables = {}
    while words and (found := re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", words[0])):
        variables[found[1]] = found[2]
        words = words[1:]
    if words[:2] == ["vllm", "serve"]:
        words = words[2:]
    model = words.pop(0) if words and not words[0].startswith("-") else None
    options, _ = _parser().parse_known_args([_hyphens(word) for word in words])
    for name, reason in ALONE.items():
        if getattr(options, name) != 1:
            raise RequestError(f"{OPTION}: --{name.replace('_', '-')} keeps vLLM's own path: {reason}; leave it out")
    for name, remedy in UNREAD.items():
        if getattr(options, name) is not None:
            raise RequestError(f"{OPTION}: --{name.replace('_', '-')} is not read here; {remedy}")
    model = options.model or model
    if not model:
        raise RequestError(f"{OPTION}: no model; begin with it, as in {OPTION} 'deepseek-ai/DeepSeek-R1 -tp 8', or use --model")
    backend = options.attention_backend
    return Command(
        model=model,
        tp=options.tensor_parallel_size,
        dtype=DTYPES[options.dtype],
        kv_cache_dtype=options.kv_cache_dtype,
        backend=None if backend is None else backend.upper(),
        variables=frozenset(variables.items()),
    )


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--attention-backend")
    parser.add_argument("--decode-context-parallel-size", "-dcp", type=int, default=1)
    parser.add_argument("--prefill-context-parallel-size", "-pcp", type=int, default=1)
    for name in UNREAD:
        parser.add_argument(f"--{name.replace('_', '-')}")
    return parser


def _hyphens(word: str) -> str:
    """vLLM takes --tensor_parallel_size, too."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word
