"""Which shapes are timed in which mode, and what is refused."""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch
from gating import GivenPlan, plan_without

from dyndepth.common.errors import RunFailed, UserError
from dyndepth.runtime import attach as runtime
from dyndepth.timing import __main__ as door
from dyndepth.timing import measure as measuring
from dyndepth.timing import passes
from dyndepth.timing.levels import (
    LEVELS,
    MODES,
    ON_CUDA,
    Level,
    Shape,
    check_shapes,
    level_of,
    modes_of,
    parse_shapes,
    what_fits,
)
from dyndepth.timing.measure import in_modes, measure
from dyndepth.timing.passes import WHOLE

HALF = GivenPlan(plan=plan_without(4, (1, 0), (1, 1), (2, 0), (2, 1)))


def windows(count: int = 6, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))


def level(*shapes: Shape, **changes: int) -> Level:
    return Level(shapes, **{"texts": 3, "pairs": 6, "most": 6, "warmup": 1} | changes, **LOOSE)


LOOSE = {"precision": 0.0, "seconds": 0.0}


# --- shapes ---------------------------------------------------------------------------------------


def test_a_gpu_is_timed_in_full_on_shapes_of_its_own():
    shapes = level_of("full", "cuda").shapes
    assert {shape.length for shape in shapes} == {512, 2048, 4096}
    assert {shape.batch for shape in shapes if shape.new_tokens} == {1, 8, 32}
    assert level_of("full", "cpu") is LEVELS["full"]
    assert level_of("quick", "cuda") is LEVELS["quick"]
    assert set(ON_CUDA) <= set(LEVELS)


def test_what_a_model_does_not_take_is_left_out_of_a_named_level():
    chosen, longer = what_fits(2048, "full", "cuda")
    assert {shape.length for shape in chosen.shapes} == {512, 2048}
    assert longer == [shape for shape in level_of("full", "cuda").shapes if shape.length == 4096]
    assert what_fits(None, "full", "cuda")[1] == []
    check_shapes(2048, "full", "cuda")
    with pytest.raises(UserError, match=r"timing 1 x 64 \+ 2: 66 tokens are too long .*of 20"):
        check_shapes(20, "quick")


def test_what_was_asked_for_by_hand_is_refused():
    with pytest.raises(UserError, match="timing 8 x 4096: 4096 tokens are too long"):
        check_shapes(2048, level(Shape(1, 512, 2), Shape(8, 4096, 0)))


def test_the_shapes_that_were_left_out_are_told(tiny, monkeypatch):
    monkeypatch.setitem(LEVELS, "quick", level(Shape(1, 12, 1), Shape(1, 4096, 1)))
    with pytest.warns(UserWarning, match=r"timing 1 x 4096 \+ 1 is left out"):
        rows = measure(tiny(), HALF, windows(), progress=False)
    assert {row["length"] for row in rows} == {12}


def test_shapes_are_read():
    assert parse_shapes("1x512+32, 8x2048,1x512+32") == (Shape(1, 512, 32), Shape(8, 2048, 0))
    assert [str(shape) for shape in parse_shapes("1x512+32,8x2048")] == ["1 x 512 + 32", "8 x 2048"]


@pytest.mark.parametrize("text", ["", ",", "512", "0x5", "1x0", "1x5+", "1x5+2+3", "-1x5", "1×5"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(UserError, match="--shapes"):
        parse_shapes(text)


def test_a_shape_without_steps_has_no_decode_row(tiny):
    rows = measure(tiny(), HALF, windows(), level=level(Shape(2, 12, 0)), progress=False)
    assert [(row["phase"], row["new_tokens"]) for row in rows] == [("prefill", 0)]


def _too_small(monkeypatch, *batches):
    real = measuring._pairs

    def pairs(model, method, shape, *rest):
        if shape.batch in batches:
            raise torch.OutOfMemoryError("no room")
        return real(model, method, shape, *rest)

    monkeypatch.setattr(measuring, "_pairs", pairs)


def test_a_shape_without_room_is_left_out_and_the_others_stand(tiny, monkeypatch):
    _too_small(monkeypatch, 2)
    shapes = level(Shape(2, 6, 1), Shape(1, 6, 1))
    with pytest.warns(UserWarning, match=r"2 x 6 \+ 1 is left out: the memory"):
        rows = measure(tiny(), HALF, windows(), level=shapes, progress=False)
    assert {row["batch"] for row in rows} == {1}


def test_no_room_for_anything_is_a_failure(tiny, monkeypatch):
    _too_small(monkeypatch, 1)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(RunFailed, match="every shape"):
        measure(tiny(), HALF, windows(), level=level(Shape(1, 6, 1)), progress=False)


def test_on_a_gpu_the_warm_up_meets_every_text():
    texts = [torch.zeros(1, 1)] * 5
    assert measuring._warmup(level(warmup=2), texts, "cuda") == 5
    assert measuring._warmup(level(warmup=9), texts, "cuda") == 9
    assert measuring._warmup(level(warmup=2), texts, "cpu") == 2


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "name", "device", "found"),
    [
        (None, "full", "cuda", ("eager", "graphs")),
        (None, "quick", "cuda", ("eager",)),
        (None, "full", "cpu", ("eager",)),
        ("eager", "full", "cuda", ("eager",)),
        ("graphs", "quick", "cuda", ("graphs",)),
        ("both", "quick", "cuda", MODES),
    ],
)
def test_the_modes_follow_level_and_device_unless_given(mode, name, device, found):
    assert modes_of(mode, name, device) == found


@pytest.mark.parametrize("mode", ["graphs", "both"])
def test_graphs_without_a_gpu_are_refused_in_one_sentence(mode, capsys):
    with pytest.raises(UserError, match="graphs need a CUDA device"):
        modes_of(mode, "full", "cpu")
    assert door.main(["--method", "dense", "--mode", mode, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "graphs need a CUDA device" in said
    assert said.count("\n") == 1


def test_a_mode_that_is_none_is_refused(tiny):
    with pytest.raises(UserError, match="none of eager, graphs"):
        measure(tiny(), HALF, windows(), mode="both", progress=False)


def test_a_mode_that_nobody_asked_for_is_left_out_where_it_cannot_be():
    def timed(mode):
        if mode == "graphs":
            raise UserError("graphs cannot be recorded")
        return [{"mode": mode}]

    with pytest.warns(UserWarning, match="graphs mode is left out: graphs cannot"):
        assert in_modes(MODES, None, timed) == [{"mode": "eager"}]
    with pytest.raises(UserError, match="cannot be recorded"):
        in_modes(MODES, "both", timed)
    with pytest.raises(UserError, match="cannot be recorded"):
        in_modes(("graphs",), None, timed)


@pytest.fixture
def graphs(monkeypatch):
    """A stand-in for the runtime's graphs: what was opened, and every attachment that got one."""
    opened, attached = [], []

    class Graphs(contextlib.nullcontext):
        def __enter__(self):
            opened.append(self)
            return self

    def attach(model, method, *, mode="eager", **how):
        attached.append((method, mode))
        return runtime.attach(model, method, **how)

    module = types.ModuleType("dyndepth.runtime.graphs")
    module.Graphs = Graphs
    monkeypatch.setitem(sys.modules, "dyndepth.runtime.graphs", module)
    monkeypatch.setattr(passes, "attach", attach)
    return opened, attached


def test_in_graphs_mode_both_sides_are_attached_with_the_same_graphs(tiny, graphs):
    opened, attached = graphs
    shapes = level(Shape(1, 12, 2), Shape(2, 6, 1))
    check = [([5, 6, 7], [8, 9], 0.0)]
    rows = measure(
        tiny(), HALF, windows(), level=shapes, mode="graphs", check=check, progress=False
    )
    assert {row["mode"] for row in rows} == {"graphs"}
    assert all(row["total_speedup"] > 1 for row in rows)
    assert {mode for _, mode in attached} == set(opened)  # the check's, and one a shape
    assert len(opened) == 3
    for own in opened[1:]:
        methods = [method for method, mode in attached if mode is own]
        assert methods.count(WHOLE) == methods.count(HALF) == len(methods) / 2
    first = [method for method, mode in attached if mode is opened[0]]
    assert first == [HALF] * len(first)


def test_in_eager_mode_dense_is_not_attached_and_no_mode_is_said(tiny, graphs):
    opened, attached = graphs
    measure(tiny(), HALF, windows(), level=level(Shape(1, 12, 1)), progress=False)
    assert not opened
    assert {method is HALF and mode == "eager" for method, mode in attached} == {True}


def test_what_stands_for_dense_executes_everything(tiny):
    model, tokens = tiny(), windows(2)
    with torch.no_grad():
        expected = model(tokens).logits
        with runtime.attach(model, WHOLE) as trace:
            assert torch.equal(model(tokens).logits, expected)
        totals = trace.totals()
    assert totals["block_flops"] == totals["dense_block_flops"] > 0
