"""Model shapes: what of a model the MLA decode prologue depends on.

A shape comes from a preset (`PRESETS`) or from the model's own config.json (`read_config`); `resolve_model` takes either.
Sizes count elements; heads are those of the whole model, before tensor parallelism (`heads_per_rank` divides them).  Whatever
is wrong with a name or a file is a `ModelError` of one line.
"""

import difflib
import itertools
import json
import os
import re
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from mlagen.errors import ModelError

MAX_CONFIG_BYTES = 16 << 20  # published ones are well under 1 MiB; what is larger is another file, weights for instance


class _Range(NamedTuple):
    """The integers low, low + step, ..., high, and why only those."""

    low: int
    high: int
    step: int = 1
    why: str = ""

    def holds(self, value: object) -> bool:
        # bool is an int in Python, but `true` in a config is a mistake, not a 1.
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return self.low <= value <= self.high and value % self.step == 0

    def __str__(self) -> str:
        multiple = f", a multiple of {self.step}{self.why}" if self.step > 1 else ""
        return f"an integer from {self.low} to {self.high}{multiple}"


_HEADS = _Range(1, 4096)
_NOPE = _Range(16, 512, 16, " (the matrix cores take W_UK 16 elements at a time)")
_LORA = _Range(16, 2048, 16, " (the matrix cores take W_UK 16 elements at a time)")
_ROPE = _Range(0, 512, 2, " (RoPE rotates pairs)")
_VALUE = _Range(1, 4096)
_Q_RANK = _Range(1, 65536)
_NAME = "[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"


def _is_text(value: object, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _show(value: object) -> str:
    """A short repr in one line."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 60
    try:
        text = brief.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = "an integer of thousands of digits"
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of one model's MLA layers.  Raises ModelError where a field is not what it may be.

    name        1 to 64 letters, digits and . _ + -: file names are made of it
    heads       attention heads of the whole model, before tensor parallelism; 1 to 4096
    lora_rank   L, elements of the latent kv_c; a multiple of 16, 16 to 2048
    nope_dim    P, elements of q per head that carry no position; a multiple of 16, 16 to 512
    rope_dim    R, elements of q_pe per head and of k_pe; even, 0 to 512
    rope_style  "gptj" rotates neighbours (0,1) (2,3) .., "neox" halves (0,R/2) (1,R/2+1) .., "none" copies the R columns as
                they are and is the only style of R = 0
    v_head_dim  elements of v per head; 1 to 4096
    q_lora_rank elements of the compressed q, 1 to 65536; None where q is projected in one step
    dtype       of the activations: "bf16" or "fp16"
    source      where the numbers come from, in one line of at most 200 characters
    """

    name: str
    heads: int
    lora_rank: int
    nope_dim: int
    rope_dim: int
    rope_style: str
    v_head_dim: int
    q_lora_rank: int | None
    dtype: str
    source: str

    def __post_init__(self) -> None:
        if not _is_text(self.name, _NAME):
            allowed = "1 to 64 letters, digits and . _ + -, the first a letter or a digit"
            raise ModelError(f"a model's name is {_show(self.name)}, but must be {allowed}")
        ranges = {"heads": _HEADS, "lora_rank": _LORA, "nope_dim": _NOPE, "rope_dim": _ROPE, "v_head_dim": _VALUE}
        for field, allowed_range in ranges.items():
            self._check(field, allowed_range.holds(getattr(self, field)), str(allowed_range))
        self._check("q_lora_rank", self.q_lora_rank is None or _Q_RANK.holds(self.q_lora_rank), f"{_Q_RANK}, or None")
        self._check("rope_style", _is_text(self.rope_style, "none|gptj|neox"), "none, gptj or neox")
        self._check("rope_style", self.rope_dim > 0 or self.rope_style == "none", "none where rope_dim is 0")
        self._check("dtype", _is_text(self.dtype, "bf16|fp16"), "bf16 or fp16")
        self._check("source", _is_text(self.source, ".{1,200}") and self.source.isprintable(), "1 to 200 printable characters")

    def _check(self, field: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ModelError(f"model {self.name}: {field} is {_show(getattr(self, field))}, but must be {allowed}")


# The RoPE style is the one that vLLM 0.33 rotates with; all of these models are published in bfloat16.  "published config.json"
# means that a copy of that very file was read; a class is of transformers 5.20, and its defaults describe this model.
# fmt: off
_TABLE: tuple[tuple[str, int, int, int, int, str, int, int | None, str], ...] = (
    # name             heads    L    P   R  RoPE      v  q_lora  source
    ("deepseek-v2",      128, 512, 128, 64, "gptj", 128, 1536, "DeepSeek's reference inference, config_236B.json"),
    ("deepseek-v2-lite",  16, 512, 128, 64, "gptj", 128, None, "DeepSeek's reference inference, config_16B.json"),
    ("deepseek-v3",      128, 512, 128, 64, "gptj", 128, 1536, "published config.json; DeepseekV3Config defaults"),
    ("deepseek-r1",      128, 512, 128, 64, "gptj", 128, 1536, "published config.json"),
    ("deepseek-v3.2",    128, 512, 128, 64, "gptj", 128, 1536, "published config.json; DeepseekV32Config defaults"),
    ("kimi-k2",           64, 512, 128, 64, "gptj", 128, 1536, "published config.json of Kimi-K2-Instruct and Kimi-K2.5"),
    ("kimi-linear",       32, 512, 128, 64, "none", 128, None, "KimiLinearConfig defaults; mla_use_nope as vLLM 0.33 requires"),
    ("kimi-k3",           96, 512, 128, 64, "none", 128, 1536, "published config.json, with mla_use_nope"),
    ("longcat-flash",     64, 512, 128, 64, "gptj", 128, 1536, "LongcatFlashConfig defaults"),
    ("mistral-large-3",  128, 512, 128, 64, "gptj", 128, 1536, "params.json as others quote it; the file itself unchecked"),
    ("glm-4.7-lite",      20, 512, 192, 64, "gptj", 256,  768, "Glm4MoeLiteConfig defaults"),
    ("glm-5",             64, 512, 192, 64, "gptj", 256, 2048, "published config.json; GlmMoeDsaConfig defaults"),
    ("glm5-next",         64, 512, 256,  0, "none", 256, 1536, "Glm5NextTextConfig defaults"),
    ("ax-k1",             64, 512, 128, 64, "gptj", 128, 1536, "AXK1Config defaults"),
    ("minicpm3",          40, 256,  64, 32, "neox",  64,  768, "MiniCPM3Config defaults; v is hidden_size / heads"),
)
# fmt: on

PRESETS: Mapping[str, ModelShape] = MappingProxyType({row[0]: ModelShape(*row[:-1], "bf16", row[-1]) for row in _TABLE})


def resolve_model(model: str | os.PathLike[str]) -> ModelShape:
    """The shape of a preset (its name in any case), of a config.json, or of a directory that holds one.

    A preset's name wins over a file of that name; write ./NAME for the file.  Raises ModelError where `model` is none of these,
    saying what comes close, and wherever `read_config` does.
    """
    text = _path_text(model, "the name of a preset or the path of a config.json")
    if isinstance(model, str) and (preset := PRESETS.get(text.strip().lower())) is not None:
        return preset
    try:
        os.stat(text)
    except PermissionError as error:
        raise ModelError(f"model {_show(text)}: {error.strerror}; make it readable, or copy its config.json") from None
    except (OSError, ValueError):  # no such path, or no path at all
        raise _unknown_model(text) from None
    return read_config(text)


def _unknown_model(text: str) -> ModelError:
    # A repository name such as deepseek-ai/DeepSeek-V3 comes close by its last part.
    wanted = re.split(r"[/\\]", text.strip().lower())[-1][:64]
    close = difflib.get_close_matches(wanted, PRESETS)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return ModelError(
        f"model {_show(text)} is neither a preset nor a path that exists; {hint}presets: {', '.join(PRESETS)}; "
        "for any other MLA model give the path of its config.json, or of the directory that holds it"
    )


def read_config(path: str | os.PathLike[str]) -> ModelShape:
    """The shape that a config.json describes; of a directory, its config.json, else its params.json (Mistral's own format).

    A multimodal model's language model is found in its section.  A missing dtype is bf16.  head_dim is never read: it is
    hidden_size / heads in one model's file, R in another's and P in a third's.  The name is the file's model_type.

    Raises ModelError, naming the file, the key, what it was and what it may be, where the file cannot be read, is not JSON,
    is no MLA model's, lacks a field, has one of the wrong type or out of range, or does not say how the model rotates.
    """
    file = _path_text(path, "the path of a config.json")
    if os.path.isdir(file):
        found = [name for name in ("config.json", "params.json") if os.path.isfile(os.path.join(file, name))]
        if not found:
            raise ModelError(f"the directory {_printable(file)} holds no config.json; give the path of the model's")
        file = os.path.join(file, found[0])
    return _Config(_printable(file), _load(file)).shape()


def heads_per_rank(shape: ModelShape, tp: int) -> int:
    """Attention heads on each of `tp` tensor-parallel ranks.  Raises ModelError unless `tp` is an int that divides them."""
    if not _HEADS.holds(tp) or shape.heads % tp:
        sizes = ", ".join(str(size) for size in range(1, shape.heads + 1) if shape.heads % size == 0)
        raise ModelError(f"tp is {_show(tp)}, but must divide the {shape.heads} heads of {shape.name}: it may be {sizes}")
    return shape.heads // tp


# Where a multimodal model's file keeps the language model: Kimi-K2.5, Kimi-VL and GLM5Next in text_config, DeepSeek-VL2 in
# language_config, InternVL-like models in llm_config.
_SECTIONS = ("text_config", "language_config", "llm_config")

# How a family rotates, by the beginning of its model_type or architecture in lower case without separators; the first match
# counts.  A family that is not here has to say so in its file: a guess that is wrong gives wrong numbers and no error.
_FAMILIES = (
    ("none", ("kimilinear", "kimik3")),  # with or without the flag mla_use_nope
    ("neox", ("minicpm3",)),
    ("gptj", ("deepseek", "kimi", "longcat", "glm4moelite", "glmmoedsa", "glm5next", "axk", "mistrallarge3", "mistral4")),
    ("gptj", ("panguultramoe", "bailing", "hyv4", "dots3note", "sarvammla", "youtu")),
)

_DTYPE_NAMES = MappingProxyType({"bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16", "half": "fp16"})


class _Config:
    """A parsed config.json, and the section of it that has the MLA fields.  Raises ModelError where none has."""

    def __init__(self, where: str, top: dict[str, object]) -> None:
        self.where, self.top = where, top
        candidates = [("", top), *((f"{key}.", top[key]) for key in _SECTIONS if key in top)]
        sections = [(prefix, section) for prefix, section in candidates if isinstance(section, dict)]
        mla = [(prefix, section) for prefix, section in sections if section.get("kv_lora_rank") is not None]
        if not mla:
            null = any("kv_lora_rank" in section for _, section in sections)
            what = "its kv_lora_rank is null" if null else "it has no kv_lora_rank, at the top or in text_config"
            raise ModelError(f"{where} is not an MLA model: {what}; give the config.json of a model with latent attention")
        self.prefix, self.section = mla[0]
        if self.section.get("use_mla") is False:  # DeepSeek-VL2's way to say that the ranks are not used
            raise ModelError(f"{where} is not an MLA model: {self.prefix}use_mla is false; give a model with latent attention")

    def shape(self) -> ModelShape:
        """The shape described.  Raises ModelError."""
        # n_heads is what Mistral's and DeepSeek's own formats call it; their null q_lora_rank is 0.
        native = "n_heads" in self.section and "num_attention_heads" not in self.section
        heads = self.integer("n_heads" if native else "num_attention_heads", _HEADS)
        rope_dim = self.integer("qk_rope_head_dim", _ROPE)
        q_lora_rank = self.section.get("q_lora_rank")
        one_step = q_lora_rank is None or (q_lora_rank == 0 and type(q_lora_rank) is int)
        kinds = [kind for holder in (self.top, self.section) for kind in _kinds(holder)]
        name = re.sub(r"[^a-z0-9._+]+", "-", kinds[0].lower()).strip("-._+")[:64] if kinds else ""
        return ModelShape(
            name=name or "mla",
            heads=heads,
            lora_rank=self.integer("kv_lora_rank", _LORA),
            nope_dim=self.integer("qk_nope_head_dim", _NOPE),
            rope_dim=rope_dim,
            rope_style=self.rope_style(rope_dim, "gptj" if native else None),
            v_head_dim=self.v_head_dim(heads),
            q_lora_rank=None if one_step else self.integer("q_lora_rank", _Q_RANK),
            dtype=self.dtype(),
            # No path: the source ends up in generated files, which are the same on every machine.
            source=f"config.json of {name}" if name else "config.json without a model_type",
        )

    def rope_style(self, rope_dim: int, default: str | None) -> str:
        """How q_pe and k_pe are rotated; `default` serves where neither the file nor the family says.  Raises ModelError."""
        nope, interleave, neox = (self.flag(key) for key in ("mla_use_nope", "rope_interleave", "is_neox_style"))
        if rope_dim == 0 or nope:
            return "none"
        if interleave is not None and interleave is neox:
            raise self.error("is_neox_style", "the opposite of rope_interleave")
        if interleave is not None or neox is not None:
            return "gptj" if interleave or neox is False else "neox"
        style = self.family_style() or default
        if style is None:
            fix = 'add "rope_interleave": true (rotates neighbours) or false (rotates halves)'
            raise ModelError(f"{self.where} does not say how the model rotates, and its family is not known; {fix}")
        # A Kimi that denies being NoPE rotates like the others of its house.
        return "gptj" if style == "none" and nope is False else style

    def family_style(self) -> str | None:
        kinds = [re.sub(r"[^a-z0-9]", "", kind.lower()) for kind in (*_kinds(self.section), *_kinds(self.top))]
        return next((style for kind in kinds for style, families in _FAMILIES if kind.startswith(families)), None)

    def v_head_dim(self, heads: int) -> int:
        hidden = self.section.get("hidden_size")
        derived = hidden // heads if isinstance(hidden, int) and hidden % heads == 0 else 0
        if self.section.get("v_head_dim") is None and self.family_style() == "neox" and _VALUE.holds(derived):
            return derived  # MiniCPM3's file has no v_head_dim; its code takes hidden_size / heads
        return self.integer("v_head_dim", _VALUE)

    def dtype(self) -> str:
        # transformers 5 writes dtype, transformers 4 torch_dtype; a section without one has the whole model's.
        for holder, key in itertools.product((self.section, self.top), ("dtype", "torch_dtype")):
            value = holder.get(key)
            if value is not None:
                dtype = _DTYPE_NAMES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
                if dtype is None:
                    allowed = '"bfloat16" or "float16": set it to the one that the model is served in'
                    prefix = self.prefix if holder is self.section else ""
                    raise ModelError(f"{self.where}: {prefix}{key} is {_show_json(value)}, but must be {allowed}")
                return dtype
        return "bf16"

    def integer(self, key: str, allowed: _Range) -> int:
        value = self.section.get(key)
        if not isinstance(value, int) or not allowed.holds(value):
            raise self.error(key, str(allowed))
        return value

    def flag(self, key: str) -> bool | None:
        value = self.section.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true, false or absent")
        return value

    def error(self, key: str, allowed: str) -> ModelError:
        was = f"is {_show_json(self.section[key])}" if key in self.section else "is missing"
        return ModelError(f"{self.where}: {self.prefix}{key} {was}, but must be {allowed}; correct the file")


def _load(file: str) -> dict[str, object]:
    """The JSON object in `file`.  Raises ModelError."""
    where = _printable(file)
    try:
        info = os.stat(file)
        # Neither a pipe, which would wait for a writer, nor a device, which need not end, nor gigabytes of weights.
        readable = stat.S_ISREG(info.st_mode) and info.st_size <= MAX_CONFIG_BYTES
        data = Path(file).read_bytes() if readable else b""
    except OSError as error:
        raise ModelError(f"{where} cannot be read: {error.strerror or type(error).__name__}; check the path") from None
    except ValueError:  # a NUL, or a character that the file system's encoding lacks
        raise ModelError(f"{where} cannot be a path; check its characters") from None
    if not readable:
        raise ModelError(f"{where} is not a regular file of at most {MAX_CONFIG_BYTES >> 20} MiB; give the model's config.json")
    if not data.strip():
        raise ModelError(f"{where} is empty; fetch the model's config.json again")
    try:
        config = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start})"
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except ValueError:
        problem = "holds a number of more digits than Python reads"
    except RecursionError:
        problem = "is nested too deeply"
    else:
        if isinstance(config, dict):
            return config
        problem = f"holds {_show_json(config)} where a JSON object belongs"
    raise ModelError(f"{where} {problem}; give the model's own config.json")


def _kinds(config: dict[str, object]) -> list[str]:
    """The model_type and the architectures that a config claims; LongCat-Flash's has no model_type."""
    architectures = config.get("architectures")
    listed = architectures if isinstance(architectures, list) else [architectures]
    return [kind for kind in (config.get("model_type"), *listed) if isinstance(kind, str)]


def _path_text(path: object, allowed: str) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise ModelError(f"model is {_show(path)}, but must be {allowed}")
    return os.fsdecode(path)


def _printable(path: str) -> str:
    """A path as messages show it: in one line that ends with the file's name, whatever the path holds."""
    short = path if len(path) <= 300 else f"...{path[-300:]}"
    return short if short.isprintable() and short else ascii(short)


def _show_json(value: object) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(_show(value), _show(value))
