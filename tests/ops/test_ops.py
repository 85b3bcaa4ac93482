"""The operators in eager mode and on tensors without data."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mlagen import ops
from mlagen.errors import ArgumentError, SpecError, TargetError
from mlagen.shipped import shipped_matrix
from mlagen.spec import PrologueSpec
from mlagen.verify import make_case

OP = torch.ops.mlagen.decode_prologue.default
PACK = torch.ops.mlagen.pack_weights.default
TOKENS = (0, 1, 2, 7, 16, 17, 65)
EVERY_CHECK = (
    *("test_schema", "test_autograd_registration", "test_faketensor"),
    *("test_aot_dispatch_static", "test_aot_dispatch_dynamic"),
)
# torch's own comparison of mutated arguments before and after a call has no fp8.
EVERY_CHECK_WITH_FP8 = EVERY_CHECK[1:]

HALF = (torch.bfloat16, torch.float16)

host = pytest.mark.host


def with_heads(setup, q_heads):
    return {**setup.options, "q_heads": q_heads}


# The spec as text.


def test_each_spec_has_one_text_that_gives_it_back():
    specs = {request.spec for request in shipped_matrix()}
    specs |= {dataclasses.replace(spec, rounding="stepwise") for spec in specs}
    specs |= {dataclasses.replace(spec, fp8_max=224) for spec in specs if "fp8" in (spec.q_dtype, spec.kv_dtype)}
    specs |= {dataclasses.replace(spec, nope_first=False) for spec in specs}
    specs |= {dataclasses.replace(spec, weight="fp8", compute=compute) for spec in specs for compute in ("a16", "a8")}
    specs |= {dataclasses.replace(spec, kv_heads=2) for spec in specs}
    usual = {spec for spec in specs if spec.nope_first and spec.kv_heads == 1}
    specs |= {dataclasses.replace(spec, kv_layout="segmented") for spec in usual}
    scaled = {spec for spec in usual if spec.kv_dtype == "fp8" and (spec.fp8_max is None or spec.q_dtype == "fp8")}
    specs |= {dataclasses.replace(spec, kv_layout="fp8_ds_mla") for spec in scaled if spec.lora_rank % 128 == 0}
    specs |= {dataclasses.replace(spec, q_scaling="token") for spec in usual if spec.q_dtype == "fp8"}
    specs |= {dataclasses.replace(spec, q_split=True) for spec in specs if spec.rope_dim and spec.q_scaling == "static"}
    with_fp8_max = {spec for spec in specs if spec.fp8_max}
    specs |= {
        dataclasses.replace(spec, **{part: False})
        for spec in specs - with_fp8_max
        if not spec.q_split and spec.q_scaling == "static"
        for part in ("write_q", "write_kv")
    }
    texts = {ops.spec_to_str(spec): spec for spec in specs}
    assert len(texts) == len(specs)
    assert all(ops.spec_from_str(text) == spec for text, spec in texts.items())


def test_the_text_is_legible_and_safe_to_quote():
    spec = PrologueSpec(heads=16, nope_dim=128, lora_rank=512, rope_dim=64, rope_style="gptj", fp8_max=224)
    assert ops.spec_to_str(spec) == (
        "heads=16,nope_dim=128,lora_rank=512,rope_dim=64,rope_style=gptj,"
        "dtype=bf16,weight=bf16,q_dtype=fp8,kv_dtype=fp8,rounding=fused,fp8_max=224.0,nope_first=True,"
        "compute=a16,q_scaling=static,q_split=False,write_q=True,write_kv=True,kv_heads=1,kv_layout=paged"
    )


def test_a_field_that_is_left_out_has_its_default():
    short = "heads=16,nope_dim=128,lora_rank=512,rope_dim=64,rope_style=gptj"
    assert ops.spec_from_str(short) == PrologueSpec(heads=16, nope_dim=128, lora_rank=512, rope_dim=64, rope_style="gptj")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not one of heads=..."),
        ("heads=16", "nope_dim, lora_rank, rope_dim, rope_style missing"),
        ("heads=16,heads=16", "'heads=16' is not one of"),
        ("heads=16,tp=8", "'tp=8' is not one of"),
        ("heads=many", "'heads=many' is not int"),
        ("nope_first=", "'nope_first=' is not bool"),
        ("nope_first=false", "'nope_first=false' is not bool"),
        ("heads=16,nope_dim=128,lora_rank=500,rope_dim=64,rope_style=gptj", "lora_rank=500"),
    ],
)
def test_a_text_that_is_no_spec(text, message):
    with pytest.raises(SpecError) as caught:
        ops.spec_from_str(text)
    assert message in str(caught.value)


# Registration.


def test_importing_mlagen_ops_registers_them_once():
    code = """
import gc, importlib, torch, mlagen.runtime
assert not hasattr(torch.ops.mlagen, "decode_prologue")
import mlagen.ops, sys
importlib.reload(mlagen.ops)
del sys.modules["mlagen.ops"]
importlib.import_module("mlagen.ops")
gc.collect()
print(torch.ops.mlagen.decode_prologue.default._schema)
print(torch.ops.mlagen.decode_prologue_q.default._schema)
print(torch.ops.mlagen.decode_prologue_pair.default._schema)
print(torch.ops.mlagen.decode_prologue_kv.default._schema)
print(torch.ops.mlagen.pack_weights.default._schema)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # Graphs are stored with these: arguments may be added at the end, with defaults, and nothing else may change.
    assert done.stdout.splitlines() == [
        (
            "mlagen::decode_prologue(Tensor q, Tensor? q_pe, Tensor kv_c, Tensor? k_pe, Tensor? packed, Tensor(a!) kv_cache, "
            "Tensor slot_mapping, Tensor? positions=None, Tensor? cos_sin_cache=None, Tensor? sin=None, Tensor? q_scale=None, "
            'Tensor? k_scale=None, *, str spec, str arch="", int? q_heads=None) -> Tensor'
        ),
        (
            "mlagen::decode_prologue_q(Tensor q, Tensor? q_pe, Tensor? packed, Tensor? positions=None, Tensor? cos_sin_cache=None, "
            'Tensor? sin=None, Tensor? q_scale=None, *, str spec, str arch="", int? q_heads=None) -> Tensor'
        ),
        (
            "mlagen::decode_prologue_pair(Tensor q, Tensor? q_pe, Tensor? kv_c, Tensor? k_pe, Tensor? packed, "
            "Tensor(a!)? kv_cache, Tensor? slot_mapping, Tensor? positions=None, Tensor? cos_sin_cache=None, Tensor? sin=None, "
            'Tensor? q_scale=None, Tensor? k_scale=None, *, str spec, str arch="", int? q_heads=None) -> (Tensor, Tensor)'
        ),
        (
            "mlagen::decode_prologue_kv(Tensor kv_c, Tensor? k_pe, Tensor(a!) kv_cache, Tensor slot_mapping, "
            "Tensor? positions=None, Tensor? cos_sin_cache=None, Tensor? sin=None, Tensor? k_scale=None, "
            '*, str spec, str arch="") -> ()'
        ),
        'mlagen::pack_weights(Tensor w_uk, Tensor? scale=None, *, str spec, str arch="") -> Tensor',
    ]


# What runs.


@host
@pytest.mark.parametrize("pair", [False, True], ids=["joined", "pair"])
def test_the_operator_does_what_the_kernel_does(setup, pair):
    for tokens in TOKENS:
        tensors = setup.tensors(tokens, pair=pair)
        setup.assert_as_kernel(tensors, OP(*tensors, **setup.options))


@host
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_head_room_is_zero(setup, tokens):
    heads = setup.spec.heads + 2
    tensors = setup.tensors(tokens)
    q_out = OP(*tensors, **with_heads(setup, heads))
    assert q_out.is_contiguous()
    setup.assert_as_kernel(tensors, q_out, heads=heads)


@host
def test_cos_and_sin_apart_and_what_may_be_left_out(setup_of):
    setup = setup_of("fp8")
    *front, cos_sin, _, q_scale, _ = setup.tensors(7, as_uint8=True)
    cos, sin = cos_sin.chunk(2, -1)
    tensors = (*front, cos, sin, q_scale, None)
    q_out = OP(*tensors, **setup.options)
    setup.assert_as_kernel(tensors, q_out)
    assert looks(fake(OP)(*tensors, **setup.options)) == looks(q_out)
    setup = setup_of("no-rope")
    q, _, kv_c, _, packed, kv_cache, slots, *_ = setup.tensors(7)
    tensors = (q, None, kv_c, None, packed, kv_cache, slots)
    q_out = OP(*tensors, **setup.options)
    setup.assert_as_kernel((*tensors, None, None, None, None, None), q_out)
    assert looks(fake(OP)(*tensors, **setup.options)) == looks(q_out)


@host
def test_every_row_is_processed_whatever_the_slots_say(setup):
    tensors = list(setup.tensors(7))
    expected = OP(*tensors, **setup.options)
    cache = tensors[5] = setup.cache()
    tensors[6] = torch.full((20,), -1)
    assert torch.equal(OP(*tensors, **setup.options).view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(cache.view(torch.uint8), setup.cache().view(torch.uint8))


@host
def test_pack_weights(setup):
    w_uk = torch.randn(setup.spec.heads, setup.spec.lora_rank, setup.spec.nope_dim).to(torch.bfloat16).mT
    if not setup.spec.absorbs:
        for pack in (PACK, fake(PACK)):
            with pytest.raises(ArgumentError, match="nothing to pack"):
                pack(w_uk, **setup.options)
        return
    packed = PACK(w_uk, **setup.options)
    assert torch.equal(packed, setup.kernel.pack_weights(w_uk))
    assert looks(packed) == looks(fake(PACK)(w_uk, **setup.options))
    torch.library.opcheck(PACK, (w_uk,), setup.options, test_utils=EVERY_CHECK)


CODED = ("fp8 weights", "fp8-block weights", "mxfp4 weights", "a8")


@host
@pytest.mark.parametrize("name", CODED)
def test_pack_weights_of_codes(setup_of, name):
    """Codes with their scales, as the kernel packs them, with and without data."""
    setup = setup_of(name)
    inputs = make_case(setup.spec, setup.kernel.target, 0, seed=2).inputs
    codes, scale = inputs["w_uk"], inputs["w_scale"]
    packed = PACK(codes, scale, **setup.options)
    assert torch.equal(packed, setup.kernel.pack_weights(codes, scale))
    assert looks(packed) == looks(fake(PACK)(codes, scale, **setup.options))
    checks = EVERY_CHECK if codes.dtype is torch.uint8 else EVERY_CHECK_WITH_FP8
    torch.library.opcheck(PACK, (codes, scale), setup.options, test_utils=checks)


@host
@pytest.mark.parametrize("name", CODED)
def test_wrong_codes_are_named_with_and_without_data(setup_of, name):
    setup = setup_of(name)
    inputs = make_case(setup.spec, setup.kernel.target, 0).inputs
    codes, scale = inputs["w_uk"], inputs["w_scale"]
    w_uk = torch.zeros(3, setup.spec.nope_dim, setup.spec.lora_rank, dtype=torch.bfloat16)
    for arguments, message in (
        ((codes,), "scale: got NoneType, expected a tensor"),
        ((codes, scale[:2]), "scale: shape [2"),
        ((codes, scale.to(torch.float64)), "scale: dtype float64"),
        ((codes[:2], scale), "w_uk: [2, "),
        ((codes.view(torch.int8), scale), "w_uk: "),
        ((w_uk, scale), "scale: w_uk is bfloat16 and has none"),
    ):
        said = []
        for op in (PACK, fake(PACK)):
            with pytest.raises(ArgumentError) as caught:
                op(*arguments, **setup.options)
            said.append(str(caught.value))
        assert said[0].startswith(message)
        assert said[0] == said[1]


@host
def test_packed_weights_of_the_other_kind_are_named_with_and_without_data(setup_of):
    """Codes for a kernel that wants them, elements for one that does not; neither takes the other's bytes."""
    for name, other in (("fp8 weights", torch.bfloat16), ("fp8", torch.uint8)):
        setup = setup_of(name)
        tensors = list(setup.tensors(5))
        tensors[4] = torch.zeros(tensors[4].shape, dtype=other)
        for op in (OP, fake(OP)):
            with pytest.raises(ArgumentError, match=r"^packed: dtype"):
                op(*tensors, **setup.options)


@host
def test_a_second_call_looks_up_one_dictionary(setup, monkeypatch):
    tensors = setup.tensors(3)
    OP(*tensors, **setup.options)
    for name in ("load", "spec_from_str"):
        monkeypatch.setattr(ops, name, None)
    OP(*tensors, **setup.options)


# Tensors without data.


def looks(tensor):
    return (tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.storage_offset(), tensor.device.type)


def fake(op):
    """`op` on fake versions of real tensors."""

    def call(*tensors, **options):
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            return op(*(each if each is None else mode.from_tensor(each) for each in tensors), **options)

    return call


@host
@pytest.mark.parametrize("room", [None, 0, 2])
def test_the_fake_result_looks_like_the_real_one(setup, room):
    options = with_heads(setup, None if room is None else setup.spec.heads + room)
    for tokens in TOKENS:
        for pair in (False, True):
            tensors = setup.tensors(tokens, pair=pair)
            real = looks(OP(*tensors, **options))
            assert looks(fake(OP)(*tensors, **options)) == real
            meta = OP(*(each if each is None else each.to("meta") for each in tensors), **options)
            assert looks(meta) == (*real[:-1], "meta")


@host
def test_fake_tensors_of_a_gpu(setup_of, monkeypatch):
    """A graph can be made where no GPU is: only who runs there must be said."""
    setup = setup_of("absorbed")
    arguments, spec = setup.tensors(5, as_uint8=True), ops.spec_to_str(dataclasses.replace(setup.spec, q_dtype="fp8"))

    def call(**options):
        with FakeTensorMode():
            tensors = [each if each is None else torch.empty(each.shape, dtype=each.dtype, device="cuda:0") for each in arguments]
            return OP(*tensors, spec=spec, **options)

    q_out = call(arch="gfx942")
    assert (str(q_out.device), q_out.dtype) == ("cuda:0", torch.float8_e4m3fnuz)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetError, match=r"^arch: torch sees no GPU to ask"):
        call()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "device_arch", lambda index: {0: "gfx950"}[index])
    assert call().dtype is torch.float8_e4m3fn


@host
def test_a_symbolic_number_of_rows_stays_one(setup):
    graph = make_fx(lambda *tensors: OP(*tensors, **setup.options), tracing_mode="symbolic")(*setup.tensors(5))
    (node,) = (node for node in graph.graph.nodes if node.target is OP)
    (q, *_) = (node for node in graph.graph.nodes if node.op == "placeholder")
    rows = node.meta["val"].shape[0]
    assert isinstance(rows, torch.SymInt)
    assert rows.node.expr.is_Symbol
    assert rows.node.expr == q.meta["val"].shape[0].node.expr
    for tokens in (2, 65):
        tensors = setup.tensors(tokens)
        setup.assert_as_kernel(tensors, graph(*tensors))


@host
@pytest.mark.parametrize(("tokens", "room"), [(0, 2), (1, 0), (5, 2), (5, 0)])
def test_opcheck(setup, tokens, room):
    options = with_heads(setup, setup.spec.heads + room) if room else setup.options
    torch.library.opcheck(OP, without_nan(setup.tensors(tokens, as_uint8=True)), options, test_utils=EVERY_CHECK)
    if setup.spec.kv_dtype == "fp8":
        torch.library.opcheck(OP, without_nan(setup.tensors(tokens, pair=True)), options, test_utils=EVERY_CHECK_WITH_FP8)


def without_nan(tensors):
    """opcheck finds that NaN differs from NaN."""
    return tuple(each.nan_to_num_() if each is not None and each.dtype in HALF else each for each in tensors)


# Wrong arguments: (place among the tensors, what becomes of it, start of the message)

WRONG = {
    "q without rows": (0, lambda q: q[0, 0, 0], "q: shape []"),
    "q too wide": (0, lambda q: q.repeat(1, 1, 2), "q: shape [5, 3, 96]"),
    "q of another type": (0, lambda q: q.float(), "q: dtype float32, expected bfloat16"),
    "q with another stride": (0, lambda q: q.mT.contiguous().mT, "q: last stride 3"),
    "q_pe beside a whole q": (1, lambda _: torch.zeros(5, 3, 16, dtype=torch.bfloat16), "q[0] (q_nope): shape [5, 3, 48]"),
    "kv_c with too few rows": (2, lambda kv_c: kv_c[:4], "kv_c: shape [4, 64], expected [5, 64]"),
    "k_pe missing": (3, lambda _: None, "k_pe: expected a tensor [5, 16], got NoneType"),
    "k_pe too narrow": (3, lambda k_pe: k_pe[:, None, :14], "k_pe: shape [5, 1, 14], expected [5, 1, 16]"),
    "packed missing": (4, lambda _: None, "packed: expected a tensor"),
    "packed for fewer heads": (4, lambda packed: packed[:2], "packed: shape [2, "),
    "kv_cache of the other fp8 flavour": (
        5,
        lambda kv: kv.view(torch.float8_e4m3fnuz),
        "kv_cache: dtype float8_e4m3fnuz, expected",
    ),
    "kv_cache that is one block many times": (5, lambda kv: kv[:1].expand(4, -1, -1), "kv_cache: strides [0, 80, 1], its rows"),
    "kv_cache with joined blocks": (5, lambda kv: kv.flatten(0, 1), "kv_cache: shape [160, 80]"),
    "slot_mapping too short": (6, lambda slots: slots[:4], "slot_mapping: shape [4], expected [>=5]"),
    "slot_mapping with gaps": (6, lambda slots: slots.repeat(2)[::2], "slot_mapping: last stride 2"),
    "positions missing": (7, lambda _: None, "positions: expected a tensor [5]"),
    "positions for more rows": (7, lambda positions: positions.repeat(2), "positions: shape [10], expected [5]"),
    "positions of another type": (7, lambda positions: positions.float(), "positions: dtype float32"),
    "cos_sin_cache too narrow": (8, lambda table: table[:, :8], "cos_sin_cache: shape [512, 8]"),
    "sin beside a joined table": (9, lambda _: torch.zeros(512, 8), "cos_sin_cache[0] (cos): shape [512, 16]"),
    "q_scale for each row": (10, lambda _: torch.ones(5), "q_scale: shape [5], expected [] or [1]"),
    "k_scale of another type": (11, lambda scale: scale.double(), "k_scale: dtype float64"),
}


@host
def test_a_segmented_cache_of_broken_slots_is_named_with_and_without_data(setup_of):
    setup = setup_of("segmented")
    tensors = list(setup.tensors(5))
    tensors[5] = tensors[5][:, :-1]
    for op in (OP, fake(OP)):
        with pytest.raises(ArgumentError, match=r"^kv_cache: shape \[10, 1279\], expected \[blocks, block_size \* 80\]"):
            op(*tensors, **setup.options)


@host
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_with_and_without_data(setup_of, name):
    setup = setup_of("fp8")
    place, change, message = WRONG[name]
    tensors = list(setup.tensors(5))
    tensors[place] = change(tensors[place])
    said = []
    for op in (OP, fake(OP)):
        with pytest.raises(ArgumentError) as caught:
            op(*tensors, **setup.options)
        said.append(str(caught.value))
    assert said[0].startswith(message)
    assert said[0] == said[1]


@host
def test_wrong_options_are_named_with_and_without_data(setup_of):
    setup = setup_of("fp8")
    tensors = setup.tensors(5)
    for op in (OP, fake(OP)):
        with pytest.raises(ArgumentError, match=r"^q_heads: 2, expected None or at least the spec's 3"):
            op(*tensors, **with_heads(setup, 2))
        with pytest.raises(SpecError, match=r"^spec='heads=3'"):
            op(*tensors, spec="heads=3", arch=setup.options["arch"])
        with pytest.raises(TargetError, match=r"^arch: "):
            op(*tensors, spec=setup.options["spec"])
        with pytest.raises(TargetError, match=r"^arch='gfx1'"):
            op(*tensors, spec=setup.options["spec"], arch="gfx1")


@host
@pytest.mark.parametrize(("place", "name"), [(0, "q"), (4, "packed"), (8, "cos_sin_cache")])
def test_an_input_that_requires_grad_is_refused_where_gradients_are_recorded(setup_of, place, name):
    setup = setup_of("fp8")
    tensors = list(setup.tensors(5))
    tensors[place] = tensors[place].detach().requires_grad_()
    for op in (OP, fake(OP)):
        with pytest.raises(ArgumentError, match=f"^{name}: requires grad"):
            op(*tensors, **setup.options)
    for off in (torch.no_grad, torch.inference_mode):
        tensors[5] = setup.cache()
        with off():
            setup.assert_as_kernel(tensors, OP(*tensors, **setup.options))
    w_uk = torch.zeros(3, 32, 64, dtype=torch.bfloat16, requires_grad=True)
    for op in (PACK, fake(PACK)):
        with pytest.raises(ArgumentError, match=r"^w_uk: requires grad"):
            op(w_uk, **setup.options)


@host
def test_a_write_to_the_cache_counts_as_one(setup_of):
    """autograd notices where it kept the cache for a backward pass; tensors made in inference mode are not counted."""
    setup = setup_of("fp8")
    tensors = setup.tensors(5)
    before = tensors[5]._version
    OP(*tensors, **setup.options)
    assert tensors[5]._version > before
    with torch.inference_mode():
        OP(*setup.tensors(5), **setup.options)
