"""What of the times that are wanted a cell lacks, and what new ones replace."""

from __future__ import annotations

import pytest
from cells import cell
from hypothesis import example, given
from hypothesis import strategies as st

from dyndepth.cells.times import Shape, Wanted, missing, one_each, reached, renewed
from dyndepth.results.columns import TIMING

ONE, MANY = Shape(1, 512, 16), Shape(32, 2048, 16)
EAGER = ("eager",)


def rows(shape: Shape, level: str = "quick", **more):
    size = {"batch": shape.batch, "length": shape.length, "level": level, "mode": "eager"}
    found = [size | {"phase": "prefill", "new_tokens": 0} | more]
    if shape.new_tokens:
        found.append(size | {"phase": "decode", "new_tokens": shape.new_tokens} | more)
    return found


@pytest.mark.parametrize(
    ("held", "wanted", "lacking"),
    [
        (rows(ONE), [ONE], ()),
        (rows(ONE), [ONE, MANY], (MANY,)),
        (rows(ONE), [Shape(1, 512, 8)], ()),  # over as many steps, and more
        (rows(ONE), [Shape(1, 512, 64)], (Shape(1, 512, 64),)),
        (rows(Shape(1, 512, 0)), [Shape(1, 512, 0)], ()),
        (rows(Shape(1, 512, 0)), [ONE], (ONE,)),  # decode was not timed
        ([], [ONE], (ONE,)),
    ],
)
def test_shapes_that_were_asked_for_and_are_not_there(held, wanted, lacking):
    found = missing(held, "quick", Wanted("quick", EAGER, wanted))
    assert found == ({"eager": lacking} if lacking else {})
    deeper = missing(held, "quick", Wanted("full", EAGER, wanted))
    assert deeper == {"eager": tuple(wanted)}  # none of them so thoroughly


def test_graphs_lack_no_prompts():
    decode = [row | {"mode": "graphs"} for row in rows(ONE) if row["phase"] == "decode"]
    both = ("eager", "graphs")
    assert missing(rows(ONE) + decode, "quick", Wanted("quick", both, [ONE])) == {}
    assert missing(rows(ONE), "quick", Wanted("quick", both, [ONE])) == {"graphs": (ONE,)}
    assert missing([], "off", Wanted("quick", ("graphs",), [Shape(1, 8, 0)])) == {}


def test_compiled_dense_is_lacking_where_it_was_neither_timed_nor_refused():
    asked, own = Wanted("quick", EAGER, [ONE], True), Wanted("quick", EAGER, (), True)
    plain, timed = rows(ONE), rows(ONE, speedup_over_compiled=1.2)
    refused = rows(ONE, compiled_error="no compiler")
    assert missing(plain, "quick", asked) == {"eager": (ONE,)}
    assert missing(plain, "quick", own) == {"eager": ()}  # all of the level's
    for held in (timed, refused):
        assert missing(held, "quick", asked) == missing(held, "quick", own) == {}


def test_a_level_s_own_shapes_are_not_those_that_were_asked_for():
    asked = rows(MANY, shapes="asked")
    own = Wanted("quick", EAGER)
    assert missing(asked, "quick", own) == {"eager": ()}
    assert missing(asked + rows(ONE), "quick", own) == {}
    assert reached(asked, "quick") is None
    assert reached(rows(MANY, "quick", shapes="asked") + rows(ONE, "full"), "off") == "full"


def test_new_times_replace_those_of_their_shapes():
    held = rows(ONE) + rows(MANY, shapes="asked")

    def shapes(found):
        return sorted({(row["batch"], row["length"], row["level"]) for row in found})

    more = renewed(held, "eager", rows(Shape(4, 64, 2), shapes="asked"), "quick")
    assert shapes(more) == [(1, 512, "quick"), (4, 64, "quick"), (32, 2048, "quick")]
    again = renewed(held, "eager", rows(MANY, "full", shapes="asked"), "quick")
    assert shapes(again) == [(1, 512, "quick"), (32, 2048, "full")]
    level = renewed(held, "eager", rows(Shape(8, 256, 16), "full", shapes="level"), "quick")
    assert shapes(level) == [(1, 512, "quick"), (8, 256, "full"), (32, 2048, "quick")]
    level = renewed(level, "eager", rows(ONE, "full", shapes="level"), "quick")
    assert shapes(level) == [(1, 512, "full"), (8, 256, "full"), (32, 2048, "quick")]
    other = [row | {"mode": "graphs"} for row in rows(ONE)]
    assert renewed(held, "graphs", other, "quick") == held + other


def test_a_cell_of_shapes_that_were_asked_for_alone_lacks_its_level():
    one = cell()
    one.take_times("eager", rows(ONE, shapes="asked"), "quick")
    assert (one.timing_level, one.lacks("quick")) == ("off", "timing")
    one.take_times("eager", rows(MANY, shapes="level"), "quick")
    assert (one.timing_level, one.lacks("quick"), len(one.timing)) == ("quick", "nothing", 4)
    none = cell()
    none.take_times("eager", [], "full")  # it foresees
    assert (none.timing_level, none.lacks("full")) == ("full", "nothing")


LEVELS = {"quick": (Shape(1, 64, 2), Shape(4, 32, 2)), "full": (Shape(1, 64, 4), Shape(8, 64, 4))}
SEVERAL = (Shape(1, 64, 0), Shape(1, 64, 2), Shape(1, 64, 8), Shape(4, 32, 2))
REQUESTS = st.builds(
    Wanted,
    st.sampled_from(("quick", "full")),
    st.sampled_from((("eager",), ("eager", "graphs"))),
    st.one_of(st.just(()), st.just(LEVELS["quick"]), st.tuples(st.sampled_from(SEVERAL))),
    st.booleans(),
)


def timed(one, wanted: Wanted) -> list[str]:
    """Time what ``one`` lacks of that, as a sweep does, and return what was."""
    found = []
    for mode, shapes in one.untimed(wanted).items():
        more = {"shapes": "asked" if wanted.shapes else "level", "mode": mode}
        more |= {"speedup_over_compiled": 1.5} if wanted.compiled else {}
        new = [row for each in shapes or LEVELS[wanted.level] for row in rows(each, **more)]
        if mode == "graphs":
            new = [row for row in new if row["phase"] == "decode"]
        one.take_times(mode, new, wanted.level)
        found += [f"{mode} {each}" for each in shapes or ["level"]]
    return found


COMPILED = Wanted("quick", EAGER, LEVELS["quick"], True)


@given(st.lists(REQUESTS, min_size=1, max_size=8))
@example([COMPILED, Wanted("quick", EAGER, [Shape(1, 64, 8)])])
@example([Wanted("quick", EAGER), *(Wanted("full", EAGER, each) for each in (SEVERAL[3:], ()))])
def test_nothing_that_was_asked_for_is_lost_whatever_is_asked_for_then(requests):
    one = cell()
    for place, wanted in enumerate(requests):
        timed(one, wanted)
        assert [timed(one, each) for each in requests[: place + 1]] == [[]] * (place + 1)
        names = [tuple(row.get(key) for key in TIMING.key if key != "cell") for row in one.timing]
        assert len(set(names)) == len(names)
        keys = [name[:4] for name in names]
        chosen = one_each(one.timing)
        assert len(chosen) == len(set(keys))
        if any(not wanted.shapes for wanted in requests[: place + 1]):
            assert one.lacks("quick") == "nothing"


def test_asked_shapes_leave_those_of_the_level_alone():
    one = cell()
    level, prompts = Wanted("quick", EAGER), Wanted("full", EAGER, [Shape(1, 64, 0)])
    timed(one, level)
    assert timed(one, prompts) == ["eager 1 x 64"]
    phases = [row["phase"] for row in one_each(one.timing) if row["batch"] == 1]
    assert (phases, one.timing_level) == (["decode", "prefill"], "quick")
    # All of the level's, more thoroughly: neither takes the other's place.
    every = Wanted("full", EAGER, LEVELS["quick"])
    assert [bool(timed(one, each)) for each in (every, level, every, level)] == [True, *[False] * 3]


def test_of_several_times_of_a_shape_tables_show_the_one_that_tells_most():
    def decode(**more):
        return rows(ONE, **more)[1]

    quick, full, compiled = decode(), decode(level="full"), decode(speedup_over_compiled=1.2)
    asked, longer = decode(shapes="asked"), decode(shapes="asked") | {"new_tokens": 64}
    for most, *less in ((compiled, full), (full, quick, asked), (quick, longer), (longer, asked)):
        assert one_each([most, *less]) == one_each([*less, most]) == [most]
    assert one_each([quick, other := decode()])[0] is other
    drawn = decode(level="full", temperature=1.0)
    assert one_each([drawn, quick]) == one_each([quick, drawn]) == [quick]
    assert one_each([drawn]) == [drawn]


def test_times_of_drawn_tokens_stand_beside_those_of_the_likeliest():
    both = [*rows(ONE), rows(ONE, temperature=1.0)[1]]
    assert renewed(both, "eager", both, "quick") == both
    assert renewed(both, "eager", rows(ONE), "quick") == [both[2], *rows(ONE)]
    assert not missing(both, "quick", Wanted("quick", ["eager"]))
