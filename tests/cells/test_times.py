"""What of the times that are wanted a cell lacks, and what new ones replace."""

from __future__ import annotations

import pytest
from cells import cell

from dyndepth.cells.times import Shape, Wanted, missing, reached, renewed

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


def test_new_times_replace_those_of_their_shapes_or_of_the_level():
    held = rows(ONE) + rows(MANY, shapes="asked")

    def shapes(found):
        return sorted({(row["batch"], row["length"], row["level"]) for row in found})

    more = renewed(held, "eager", rows(Shape(4, 64, 2), shapes="asked"), "quick")
    assert shapes(more) == [(1, 512, "quick"), (4, 64, "quick"), (32, 2048, "quick")]
    again = renewed(held, "eager", rows(MANY, "full", shapes="asked"), "quick")
    assert shapes(again) == [(1, 512, "quick"), (32, 2048, "full")]
    level = renewed(held, "eager", rows(Shape(8, 256, 16), "full", shapes="level"), "quick")
    assert shapes(level) == [(8, 256, "full"), (32, 2048, "quick")]
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
