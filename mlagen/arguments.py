"""The arguments of a launch: every one is checked, and only then turned into the kernel's argument values.

All checks read shapes, types, strides and devices; none reads device memory, so none waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mlagen.dtypes import model_dtype
from mlagen.errors import ArgumentError
from mlagen.spec import PrologueSpec
from mlagen.target import Target
from mlagen.torch_types import torch_dtype

Pair = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Bound:
    """Checked arguments: `values` by argument name, `out` the query output, and the tensors that the values point into."""

    tokens: int
    values: dict[str, int]
    out: torch.Tensor
    tensors: tuple[torch.Tensor, ...]


class Checker:
    """Checks against one spec and target; every method raises ArgumentError."""

    def __init__(self, spec: PrologueSpec, target: Target, device: torch.device) -> None:
        self.spec, self.target, self.device = spec, target, device
        self.model = torch_dtype(model_dtype(spec.dtype))
        self.fp8 = torch_dtype(target.fp8)

    def tensor(
        self, name: str, value: object, shape: Sequence[int | str | None], dtypes: Sequence[torch.dtype], *, rows_free: bool = True
    ) -> torch.Tensor:
        """A tensor of the given shape (None: any extent, a string: at least that many), type, device and unit last stride."""
        if not isinstance(value, torch.Tensor):
            raise ArgumentError(f"{name}: expected a tensor {_shape(shape)}, got {type(value).__name__}")
        fits = value.dim() == len(shape) and all(
            wanted is None or (extent >= int(wanted[2:]) if isinstance(wanted, str) else extent == wanted)
            for extent, wanted in zip(value.shape, shape, strict=True)
        )
        if not fits:
            raise ArgumentError(f"{name}: shape {list(value.shape)}, expected {_shape(shape)}")
        if value.dtype not in dtypes:
            raise ArgumentError(f"{name}: dtype {_name(value.dtype)}, {self._expected(value.dtype, dtypes)}")
        if value.device != self.device:
            raise ArgumentError(f"{name}: on device {value.device}, this kernel runs on {self.device}")
        if value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1:
            raise ArgumentError(f"{name}: last stride {value.stride(-1)}, expected 1: call .contiguous() on it")
        if not rows_free and not value.is_contiguous():
            raise ArgumentError(f"{name}: strides {list(value.stride())}, expected contiguous: call .contiguous() on it")
        return value

    def _expected(self, dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> str:
        text = f"expected {' or '.join(_name(each) for each in dtypes)}"
        if dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz) and self.fp8 in dtypes:
            text += f": the other fp8 flavour; {self.target.arch} computes in {self.target.fp8}, the same bytes mean other values"
        return text

    def query(self, q: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q_nope [T,H,P] and q_pe [T,H,R] from one tensor or from a pair."""
        spec = self.spec
        if isinstance(q, tuple | list):
            if len(q) != 2:
                raise ArgumentError(f"q: {len(q)} tensors, expected one tensor or a pair (q_nope, q_pe)")
            q_nope = self.tensor("q[0] (q_nope)", q[0], (None, spec.heads, spec.q_nope_dim), (self.model,))
            if spec.rope_dim == 0 and q[1] is None:
                return q_nope, None
            return q_nope, self.tensor("q[1] (q_pe)", q[1], (q_nope.shape[0], spec.heads, spec.rope_dim), (self.model,))
        whole = self.tensor("q", q, (None, spec.heads, spec.q_nope_dim + spec.rope_dim), (self.model,))
        return whole[..., : spec.q_nope_dim], whole[..., spec.q_nope_dim :]

    def rotary(self, cos_sin_cache: object) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [max_position, R/2] from the joined cache or from a pair."""
        half = self.spec.rope_dim // 2
        dtypes = (self.model, torch.float32)
        if isinstance(cos_sin_cache, tuple | list):
            if len(cos_sin_cache) != 2:
                raise ArgumentError(f"cos_sin_cache: {len(cos_sin_cache)} tensors, expected one tensor or a pair (cos, sin)")
            cos = self.tensor("cos_sin_cache[0] (cos)", cos_sin_cache[0], (">=1", half), dtypes)
            sin = self.tensor("cos_sin_cache[1] (sin)", cos_sin_cache[1], (cos.shape[0], half), (cos.dtype,))
            return cos, sin
        joined = self.tensor("cos_sin_cache", cos_sin_cache, (">=1", 2 * half), dtypes)
        return joined[:, :half], joined[:, half:]

    def scale(self, name: str, value: object) -> torch.Tensor | None:
        """A 0-dim or one-element fp32 tensor on the device, or None."""
        if value is None:
            return None
        if not isinstance(value, torch.Tensor):
            raise ArgumentError(
                f"{name}: expected an fp32 tensor on {self.device} or None, got {type(value).__name__}: "
                "the kernel reads the scale from device memory, so that a captured graph sees it change"
            )
        if value.dim() > 1 or value.numel() != 1:
            raise ArgumentError(f"{name}: shape {list(value.shape)}, expected [] or [1]")
        return self.tensor(name, value, value.shape, (torch.float32,))

    def indices(self, name: str, value: object, extent: int | str) -> torch.Tensor:
        """An int64 or int32 vector."""
        return self.tensor(name, value, (extent,), (torch.int64, torch.int32), rows_free=False)

    def cache(self, value: object) -> torch.Tensor:
        """kv_cache [blocks, block_size, L+R]; uint8 is read as the arch's fp8."""
        dtypes = (self.fp8, torch.uint8) if self.spec.kv_dtype == "fp8" else (self.model,)
        return self.tensor("kv_cache", value, (None, ">=1", self.spec.entry_dim), dtypes)


def bind(
    checker: Checker,
    packed_shape: Sequence[int],
    q: object,
    kv_c: object,
    k_pe: object,
    packed: object,
    kv_cache: object,
    slot_mapping: object,
    positions: object,
    cos_sin_cache: object,
    q_scale: object,
    k_scale: object,
    out: object,
) -> Bound:
    """Check everything and give the kernel's argument values.  Raises ArgumentError before anything is launched."""
    spec = checker.spec
    q_nope, q_pe = checker.query(q)
    tokens = q_nope.shape[0]
    latent = checker.tensor("kv_c", kv_c, (tokens, spec.lora_rank), (checker.model,))
    cache = checker.cache(kv_cache)
    slots = checker.indices("slot_mapping", slot_mapping, f">={tokens}")
    tensors = {"q_nope": q_nope, "kv_c": latent, "slot_mapping": slots, "kv_cache": cache}
    if spec.rope_dim:
        assert q_pe is not None, "query() gives q_pe where there is one"
        shape = (tokens, 1, spec.rope_dim) if isinstance(k_pe, torch.Tensor) and k_pe.dim() == 3 else (tokens, spec.rope_dim)
        tensors |= {"q_pe": q_pe, "k_pe": checker.tensor("k_pe", k_pe, shape, (checker.model,))}
    if spec.absorbs:
        tensors["w_uk"] = checker.tensor("packed", packed, (spec.heads, *packed_shape), (checker.model,), rows_free=False)
    elif packed is not None:
        raise ArgumentError("packed: this kernel does no absorb (weight='none'), pass None")
    values: dict[str, int] = {"tokens": tokens, "heads": spec.heads}
    if spec.rope_style != "none":
        cos, sin = checker.rotary(cos_sin_cache)
        tensors |= {"positions": checker.indices("positions", positions, tokens), "cos": cos, "sin": sin}
        values |= {
            "cos_stride": cos.stride(0),
            "sin_stride": sin.stride(0),
            "max_position": cos.shape[0],
            "positions_int64": int(tensors["positions"].dtype is torch.int64),
            "cos_sin_float": int(cos.dtype is torch.float32),
        }
    scales = {"q_scale": checker.scale("q_scale", q_scale), "k_scale": checker.scale("k_scale", k_scale)}
    q_out = _output(checker, out, tokens)
    tensors["q_out"] = q_out
    for name in ("q_nope", "q_pe", "q_out"):
        if name in tensors:
            values |= {f"{name}_token_stride": tensors[name].stride(0), f"{name}_head_stride": tensors[name].stride(1)}
    for name in ("kv_c", "k_pe"):
        if name in tensors:
            values[f"{name}_token_stride"] = tensors[name].stride(0)
    values |= {
        "block_stride": cache.stride(0),
        "entry_stride": cache.stride(1),
        "block_size": cache.shape[1],
        "slots_int64": int(slots.dtype is torch.int64),
    }
    values |= {name: tensor.data_ptr() for name, tensor in tensors.items()}
    values |= {name: 0 if scale is None else scale.data_ptr() for name, scale in scales.items()}
    kept = (*tensors.values(), *(scale for scale in scales.values() if scale is not None))
    return Bound(tokens, values, q_out, kept)


def _output(checker: Checker, out: object, tokens: int) -> torch.Tensor:
    spec = checker.spec
    dtype = checker.fp8 if spec.q_dtype == "fp8" else checker.model
    if out is None:
        return torch.empty((tokens, spec.heads, spec.entry_dim), dtype=dtype, device=checker.device)
    return checker.tensor("out", out, (tokens, f">={spec.heads}", spec.entry_dim), (dtype,))


def _shape(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("any" if extent is None else str(extent) for extent in shape) + "]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
