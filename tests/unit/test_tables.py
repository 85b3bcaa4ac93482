"""Tables of layouts: what is written is read again, the nearest shape is found, and anything else than a table is refused."""

import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlagen import tables
from mlagen.errors import RequestError, ScheduleError
from mlagen.layout import Layout
from mlagen.lowering import lower
from mlagen.schedule import lay_out
from mlagen.shipped import shipped_matrix
from mlagen.spec import PrologueSpec
from mlagen.tables import FORMAT, WIDE_WEIGHT, Entry, Range, base_layout, choose_ranges, read_table, write_table
from mlagen.target import find_target

# Far from everything that is shipped, so that no shipped table is nearer than the tests' own.
FAR = {"nope_dim": 512, "lora_rank": 2048}

counts = st.integers(1, 10_000)


@st.composite
def entry_lists(draw) -> list[Entry]:
    entries = []
    for _ in range(draw(st.integers(0, 4))):
        dependent = draw(st.booleans())
        layouts = st.builds(Layout, counts, st.none() | counts, st.just(dependent))
        ends = [*sorted(draw(st.sets(counts, max_size=4))), None]
        ranges = tuple(Range(end, draw(layouts), draw(st.none() | counts)) for end in ends)
        bits = draw(st.sampled_from([4, 8, 16]))
        entries.append(Entry(draw(counts), draw(counts), draw(counts), dependent, ranges, weight_bits=bits))
    return entries


@pytest.fixture(autouse=True)
def no_tables_of_the_user(monkeypatch):
    monkeypatch.delenv("MLAGEN_TABLES", raising=False)


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Name tables in MLAGEN_TABLES: each a text, or the entries of one for gfx942."""

    def name(*contents: str | list[Entry]) -> list[str]:
        paths = []
        for number, content in enumerate(contents):
            path = tmp_path / f"{number}.json"
            path.write_text(content if isinstance(content, str) else write_table("gfx942", "a test", content), encoding="utf-8")
            paths.append(str(path))
        monkeypatch.setenv("MLAGEN_TABLES", os.pathsep.join(paths))
        return paths

    return name


def entry(heads: int = 8, tiles: int = 1, *, waves: int = 1, dependent: bool = False, **shape: int) -> Entry:
    fields = {**FAR, **shape}
    ranges = (Range(None, Layout(waves, None, dependent), tiles),)
    bits = fields.get("weight_bits", WIDE_WEIGHT)
    return Entry(fields["nope_dim"], fields["lora_rank"], heads, dependent, ranges, weight_bits=bits)


def spec_of(heads: int = 8, **changes: object) -> PrologueSpec:
    return PrologueSpec(**{"heads": heads, **FAR, "rope_dim": 64, "rope_style": "gptj", **changes})


def tiles_for(spec: PrologueSpec, arch: str = "gfx942") -> int | None:
    """What tells the tests' entries apart."""
    (only,) = choose_ranges(spec, find_target(arch))
    return only.token_tiles


# Written and read


@given(arch=st.sampled_from(["gfx942", "sm_90"]), source=st.text(), entries=entry_lists())
def test_what_is_written_is_read(arch, source, entries):
    text = write_table(arch, source, entries)
    assert read_table(text, "a test") == (arch, tuple(entries))
    assert json.loads(text)["source"] == source
    assert text.endswith("}\n")


def test_remarks_are_kept_beside_their_entry():
    entries = entry(1), replace(entry(2), found={"8": [3.5, 4.0]})
    text = write_table("gfx942", "a test", entries)
    assert [each.get("found") for each in json.loads(text)["entries"]] == [None, {"8": [3.5, 4.0]}]
    assert [each.found for each in read_table(text, "a test")[1]] == [{}, {"8": [3.5, 4.0]}]


@pytest.mark.parametrize("ends", [(), (8,), (None, None), (None, 8), (8, 8, None), (16, 8, None), (8, None, 16)])
def test_ranges_must_rise_and_end_open(ends):
    with pytest.raises(RequestError, match="must rise"):
        Entry(128, 512, 16, False, tuple(Range(end, Layout()) for end in ends))


GOOD = {
    "format": FORMAT,
    "arch": "gfx942",
    "source": "a test",
    "entries": [
        {
            "nope_dim": 512,
            "lora_rank": 2048,
            "heads": 8,
            "dependent": False,
            "ranges": [
                {"tokens": 8, "waves": 1, "block": None, "token_tiles": 1},
                {"tokens": None, "waves": 1, "block": None, "token_tiles": None},
            ],
        }
    ],
}


def changed(change: str, value: object = None) -> str:
    """GOOD with one field set, named by the way to it, or left out if the value is `...`."""
    table = json.loads(json.dumps(GOOD))
    *way, last = (int(step) if step.isdigit() else step for step in change.split("."))
    place = table
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(table)


BAD = {
    "nothing": "",
    "no JSON": "tokens: 8",
    "a list": "[]",
    "a number": "3",
    "another format": changed("format", FORMAT + 1),
    "no format": changed("format", ...),
    "no arch": changed("arch", ...),
    "no entries": changed("entries", ...),
    "entries are a number": changed("entries", 3),
    "an entry is null": changed("entries.0"),
    "no heads": changed("entries.0.heads", ...),
    "no heads at all": changed("entries.0.heads", 0),
    "half a head": changed("entries.0.heads", 0.5),
    "negative P": changed("entries.0.nope_dim", -128),
    "L in words": changed("entries.0.lora_rank", "512"),
    "dependent in words": changed("entries.0.dependent", "false"),
    "ranges are null": changed("entries.0.ranges"),
    "no ranges": changed("entries.0.ranges", []),
    "a range is a number": changed("entries.0.ranges.0", 8),
    "no open range": changed("entries.0.ranges.1.tokens", 16),
    "two open ranges": changed("entries.0.ranges.0.tokens"),
    "up to no tokens": changed("entries.0.ranges.0.tokens", 0),
    "up to true tokens": changed("entries.0.ranges.0.tokens", True),
    "up to 8 tokens in words": changed("entries.0.ranges.0.tokens", "8"),
    "no waves": changed("entries.0.ranges.0.waves", 0),
    "waves are null": changed("entries.0.ranges.0.waves"),
    "a wave and a half": changed("entries.0.ranges.0.waves", 1.5),
    "a block of nothing": changed("entries.0.ranges.0.block", 0),
    "a block in words": changed("entries.0.ranges.0.block", "8"),
    "no block": changed("entries.0.ranges.0.block", ...),
    "no token tiles": changed("entries.0.ranges.0.token_tiles", 0),
    "token tiles in a list": changed("entries.0.ranges.0.token_tiles", [1]),
}


def test_the_table_that_the_others_are_made_of_is_good():
    arch, (only,) = read_table(json.dumps(GOOD), "a test")
    assert (arch, only.heads, len(only.ranges)) == ("gfx942", 8, 2)


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_anything_else_is_refused_with_its_name_and_the_remedy(text, use):
    (path,) = use(text)
    with pytest.raises(RequestError) as caught:
        choose_ranges(spec_of(), find_target("gfx942"))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.count(path) == 1
    assert "`mlagen tune`" in message
    assert "\n" not in message


def test_the_message_says_what_is_wrong():
    with pytest.raises(RequestError, match=r"\(it has format 2, this mlagen reads 1\)"):
        read_table(BAD["another format"], "a test")
    with pytest.raises(RequestError, match=r"\(waves=1\.5: must be a whole number"):
        read_table(BAD["a wave and a half"], "a test")
    with pytest.raises(RequestError, match="KeyError: 'heads'"):
        read_table(BAD["no heads"], "a test")


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_a_file_that_cannot_be_read_is_named(kind, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe")
    monkeypatch.setenv("MLAGEN_TABLES", str(path))
    with pytest.raises(RequestError, match=r"MLAGEN_TABLES: .*table\.json cannot be read .*`mlagen tune`"):
        choose_ranges(spec_of(), find_target("gfx942"))


# The nearest shape


def test_an_own_shape_is_found(use):
    use([entry(8, 3), entry(16, 5)])
    assert [tiles_for(spec_of(heads)) for heads in (8, 16)] == [3, 5]


@pytest.mark.parametrize(("heads", "nearest"), [(1, 4), (7, 4), (9, 16), (12, 16), (31, 16), (33, 64), (4096, 64)])
def test_the_nearest_number_of_heads_is_taken(use, heads, nearest):
    """By its ratio: 8 is as far from 4 as from 16."""
    use([entry(each, each) for each in (4, 16, 64)])
    assert tiles_for(spec_of(heads)) == nearest


def test_l_counts_before_p_and_p_before_heads(use):
    use([entry(8, 1, nope_dim=256), entry(128, 2), entry(8, 3, lora_rank=1024)])
    assert tiles_for(spec_of(8)) == 2
    assert tiles_for(spec_of(8, nope_dim=384)) == 2
    assert tiles_for(spec_of(128, nope_dim=288)) == 1
    assert tiles_for(spec_of(128, lora_rank=1280)) == 3
    assert tiles_for(spec_of(8, nope_dim=256, lora_rank=1024)) == 3


def test_p_counts_before_the_bits_of_a_weight_and_these_before_heads(use):
    use([entry(8, 1, weight_bits=8), entry(128, 2), entry(8, 3, nope_dim=256, weight_bits=4)])
    assert tiles_for(spec_of(8)) == 2
    assert tiles_for(spec_of(128, weight="fp8")) == tiles_for(spec_of(128, weight="fp8-block")) == 1
    assert tiles_for(spec_of(128, weight="mxfp4")) == 1, "4 bits are nearer to 8 than to 16"
    assert tiles_for(spec_of(8, nope_dim=256)) == 3


def test_an_entry_that_does_not_say_has_weights_of_16_bits():
    """As in the tables that were written before there were others; what is written says no more than it must."""
    wide, narrow = entry(8, 1), entry(8, 1, weight_bits=4)
    text = write_table("gfx942", "a test", [wide, narrow])
    assert text.count("weight_bits") == 1
    _, (first, second) = read_table(text, "a table")
    assert (first.weight_bits, second.weight_bits) == (16, 4)
    assert (first, second) == (wide, narrow)
    with pytest.raises(RequestError, match="weight_bits=0: must be a whole number"):
        read_table(text.replace('"weight_bits": 4', '"weight_bits": 0'), "a table")


def test_tables_of_another_arch_are_not_looked_at(use):
    """Both in one list: a machine with two kinds of GPU names the tables of both."""
    use(write_table("gfx950", "a test", [entry(8, 7)]), [entry(8, 5)])
    assert (tiles_for(spec_of()), tiles_for(spec_of(), "gfx950")) == (5, 7)


def test_what_the_user_names_comes_before_what_is_shipped(use):
    spec, target = PrologueSpec.from_model("deepseek-r1", tp=8), find_target("gfx942")
    shipped = choose_ranges(spec, target)
    use([entry(16, 21, nope_dim=128, lora_rank=512)], [entry(16, 22, nope_dim=128, lora_rank=512)])
    assert choose_ranges(spec, target) == (Range(None, Layout(), 21),) != shipped
    other = PrologueSpec.from_model("deepseek-r1", tp=4)
    use([entry(16, 21, nope_dim=128, lora_rank=512)])
    assert len(choose_ranges(other, target)) > 1, "the shipped table has this very shape, the user's only a near one"


# What is made of it


def test_a_layout_that_does_not_fit_gives_way_to_the_default(use):
    """Three latent tiles of 16: no four waves share them.  The ranges beside are put together with what takes its place."""
    four, one = Layout(4), Layout()
    ranges = (Range(8, four, 2), Range(16, one), Range(32, one, 4), Range(None, four, 8))
    use([Entry(512, 48, 8, False, ranges)])
    assert choose_ranges(spec_of(lora_rank=64), find_target("gfx942")) == ranges
    assert choose_ranges(spec_of(lora_rank=48), find_target("gfx942")) == (Range(16, one), Range(32, one, 4), Range(None, one))


# Weights are packed once for all kernels of a spec.


def packings(spec: PrologueSpec, arch: str = "sm_90") -> set[int | None]:
    """m_tiles of all layouts, those of dependent launches and the one that operators look at included."""
    target = find_target(arch)
    layouts = [each.layout for dependent in (False, True) for each in choose_ranges(spec, target, dependent=dependent)]
    return {each.m_tiles for each in (*layouts, base_layout(spec, target))}


def wide_tiles(*ranges: Range, m_tiles: int = 2) -> Entry:
    given = [replace(each, layout=replace(each.layout, m_tiles=m_tiles)) for each in ranges]
    return Entry(64, 2048, 8, given[0].layout.dependent, tuple(given), weight_bits=8)


def coded(lora_rank: int = 2048) -> PrologueSpec:
    return spec_of(nope_dim=64, lora_rank=lora_rank, weight="fp8")


def test_an_entry_says_how_wide_tiles_are(use):
    use(write_table("sm_90", "a test", [wide_tiles(Range(8, Layout()), Range(None, Layout(4, 16)))]))
    assert packings(coded()) == {2}
    plain = choose_ranges(coded(), find_target("sm_90"))
    assert [each.layout.suffix for each in plain] == ["_m2", "_w4_b16_m2"]


def test_a_layout_that_gives_way_keeps_the_width(use):
    """L=1568 has 49 latent tiles of 32, which no four waves share."""
    use(write_table("sm_90", "a test", [wide_tiles(Range(8, Layout(4, 16), 2), Range(None, Layout()))]))
    assert packings(coded(1568)) == {2}
    assert choose_ranges(coded(1568), find_target("sm_90")) == (Range(None, Layout(m_tiles=2)),)


def test_a_width_that_does_not_fit_gives_way_everywhere(use):
    """L=1584 is no multiple of 32; one tile of 16 columns for each wave is what is left, in all layouts."""
    use(write_table("sm_90", "a test", [wide_tiles(Range(8, Layout()), Range(None, Layout(3)))]))
    assert packings(coded(1584)) == {None}
    assert choose_ranges(coded(1584), find_target("sm_90"))[1].layout == Layout(3)


def test_plain_launches_choose_the_width_for_both(use):
    dependent = wide_tiles(Range(None, Layout(dependent=True)))
    narrow = Entry(64, 2048, 8, False, (Range(None, Layout()),), weight_bits=8)
    use(write_table("sm_90", "a test", [dependent, narrow]))
    assert packings(coded()) == {None}


def test_widths_in_a_table():
    wide, narrow = wide_tiles(Range(None, Layout())), entry(8, 1)
    text = write_table("sm_90", "a test", [wide, narrow])
    assert text.count("m_tiles") == 1
    assert read_table(text, "a table") == ("sm_90", (wide, narrow))
    with pytest.raises(RequestError, match="m_tiles=0: must be a whole number"):
        read_table(text.replace('"m_tiles": 2', '"m_tiles": 0'), "a table")
    with pytest.raises(RequestError, match="ranges with several m_tiles"):
        Entry(128, 512, 8, False, (Range(8, Layout(m_tiles=2)), Range(None, Layout())))


@pytest.mark.parametrize("heads", [1, 16, 96, 128])
@pytest.mark.parametrize("weight", ["bf16", "fp8", "fp8-block", "mxfp4"])
def test_what_is_shipped_packs_a_spec_in_one_way(heads, weight):
    assert len(packings(PrologueSpec(heads, 128, 512, 64, "gptj", weight=weight))) == 1


def test_a_prologue_without_a_product_has_one_layout(use):
    use([entry(8, 3, waves=4)])
    assert choose_ranges(spec_of(weight="none"), find_target("gfx942")) == (Range(None, Layout()),)


def test_rows_with_scales_have_one_layout(use):
    """Their workgroup has whole rows, whatever a table says of others of their shape."""
    use([entry(8, 3, waves=4)])
    assert choose_ranges(spec_of(q_scaling="token"), find_target("gfx942")) == (Range(None, Layout()),)


def test_without_a_table_there_is_one_layout(monkeypatch):
    monkeypatch.setattr(tables, "_entries", lambda arch, named: ())
    assert choose_ranges(spec_of(), find_target("gfx942")) == (Range(None, Layout()),)
    assert choose_ranges(spec_of(), find_target("sm_90"), dependent=True) == (Range(None, Layout(dependent=True)),)


def test_dependent_kernels_have_entries_of_their_own(use):
    text = write_table("sm_90", "a test", [entry(8, 3), entry(8, 5, dependent=True)])
    use(text)
    target = find_target("sm_90")
    assert choose_ranges(spec_of(), target) == (Range(None, Layout(), 3),)
    assert choose_ranges(spec_of(), target, dependent=True) == (Range(None, Layout(dependent=True), 5),)
    with pytest.raises(ScheduleError, match="leave pdl out"):
        choose_ranges(spec_of(), find_target("gfx942"), dependent=True)


SHIPPED = {(request.spec, request.target): None for request in shipped_matrix()}


@pytest.mark.parametrize(("spec", "target"), SHIPPED)
def test_every_shipped_model_has_ranges_that_fit_and_cover_all_tokens(spec, target):
    ranges = choose_ranges(spec, target)
    ends = [each.tokens for each in ranges]
    assert ends[-1] is None
    assert ends[:-1] == sorted(set(ends[:-1]))
    layouts = {each.layout for each in ranges}
    assert len(layouts) <= 2
    lowered = lower(spec.program(target))
    for layout in layouts:
        lay_out(lowered, target, layout)
    if spec.absorbs:
        assert all(each.token_tiles for each in ranges), "no table has this shape"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1, "arch": "gfx942", "entries": ' + "[" * 100_000])
def test_a_table_that_is_nested_too_deeply(text):
    with pytest.raises(RequestError, match="not a table"):
        read_table(text, "it")


def test_a_number_that_no_shape_has():
    text = write_table("gfx942", "a test", [entry(1)]).replace('"heads": ', '"heads": 1' + "0" * 400)
    with pytest.raises(RequestError, match=r"heads=.*must be a whole number"):
        read_table(text, "it")
