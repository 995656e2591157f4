"""Which shapes are timed in which mode, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from gating import GivenPlan, RandomMask, plan_without
from recording import StandIn

from dyndepth.common.errors import RunFailed, UserError
from dyndepth.common.modes import MODES
from dyndepth.runtime import attach as runtime
from dyndepth.runtime import graphs as recordings
from dyndepth.timing import __main__ as door
from dyndepth.timing import pairing, passes, rounds
from dyndepth.timing.jobs import whole
from dyndepth.timing.levels import (
    LEVELS,
    ON_CUDA,
    STEPS,
    Level,
    Shape,
    check_shapes,
    level_of,
    modes_of,
    parse_shapes,
    what_fits,
)
from dyndepth.timing.measure import check_recordable, in_modes, measure

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
    found = parse_shapes("1x512+32, 8x2048+0,1x512+32,4x64")
    assert found == (Shape(1, 512, 32), Shape(8, 2048, 0), Shape(4, 64, STEPS))
    assert [str(shape) for shape in found] == ["1 x 512 + 32", "8 x 2048", f"4 x 64 + {STEPS}"]
    with pytest.raises(UserError, match="has 1x8 twice, with 2 and with 3 new tokens; give it on"):
        parse_shapes("1x8+2,1x8+3")


@pytest.mark.parametrize("text", ["", ",", "512", "0x5", "1x0", "1x5+", "1x5+2+3", "-1x5", "1×5"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(UserError, match="--timing_shapes"):
        parse_shapes(text)


def test_a_shape_without_steps_has_no_decode_row(tiny):
    rows = measure(tiny(), HALF, windows(), level=level(Shape(2, 12, 0)), progress=False)
    assert [(row["phase"], row["new_tokens"]) for row in rows] == [("prefill", 0)]


def _too_small(monkeypatch, *batches):
    real = rounds.measured

    def pairs(model, method, shape, *rest):
        if shape.batch in batches:
            raise torch.OutOfMemoryError("no room")
        return real(model, method, shape, *rest)

    monkeypatch.setattr(rounds, "measured", pairs)


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
    assert rounds.warmup(level(warmup=2), texts, "cuda") == 5
    assert rounds.warmup(level(warmup=9), texts, "cuda") == 9
    assert rounds.warmup(level(warmup=2), texts, "cpu") == 2
    assert rounds.warmup(level(warmup=1), texts[:1], "cuda", recorded=True) == 2


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
    with pytest.warns(UserWarning, match="graphs mode is left out"):
        assert in_modes(("graphs",), None, timed, stands=True) == []


@pytest.fixture
def graphs(monkeypatch):
    """Graphs by a stand-in for CUDA's: those that were opened, and every attachment in order."""
    opened, attached = [], []

    class Graphs(recordings.Graphs):
        def __init__(self):
            super().__init__(StandIn())
            opened.append(self)

    def attach(model, method, *, mode="eager", **how):
        attached.append((method, mode))
        return runtime.attach(model, method, mode=mode, **how)

    monkeypatch.setattr(recordings, "Graphs", Graphs)
    monkeypatch.setattr(passes, "attach", attach)
    return opened, attached


def test_in_graphs_mode_both_sides_are_attached_with_the_same_graphs(tiny, graphs):
    opened, attached = graphs
    shapes = level(Shape(1, 12, 2), Shape(2, 6, 1), Shape(1, 6, 0))
    check = [([5, 6, 7], [8, 9], 0.0)]
    rows = measure(
        tiny(), HALF, windows(), level=shapes, mode="graphs", check=check, progress=False
    )
    assert {row["mode"] for row in rows} == {"graphs"}
    assert all(row["total_speedup"] > 1 for row in rows)
    # Prompts run eagerly in either mode: no prefill is said to be by graphs.
    assert [(row["phase"], row["batch"], row["length"]) for row in rows] == [
        ("decode", 1, 12),
        ("decode", 2, 6),
    ]
    assert {mode for _, mode in attached} == set(opened)  # the check's, and one a shape
    assert len(opened) == 3
    assert all(own.steps and not own.others for own in opened)
    for own in opened[1:]:
        methods = [method for method, mode in attached if mode is own]
        assert methods.count(HALF) == len(methods) / 2
        assert len({id(method) for method in methods}) == 2
    first = [method for method, mode in attached if mode is opened[0]]
    assert first == [HALF] * len(first)


@dataclass(kw_only=True)
class Dropping(RandomMask):
    """Token gates that keep no keys of what they skip, whose steps nothing repeats."""

    kv_policy = "drop"


def test_steps_that_ran_eagerly_are_not_said_to_be_graphs(tiny, graphs):
    shapes = level(Shape(1, 12, 2))
    told = r"could not be repeated from recordings; take --mode eager"
    with pytest.raises(UserError, match=rf"^{Dropping.name}: \d+ decode steps {told}"):
        measure(tiny(), Dropping(), windows(), level=shapes, mode="graphs", progress=False)
    check = [([5, 6, 7], [8, 9], 0.0)]
    with pytest.raises(UserError, match=f"1 decode steps {told}"):  # before the pairs
        measure(
            *(tiny(), Dropping(), windows()),
            level=shapes,
            mode="graphs",
            check=check,
            progress=False,
        )
    rows = measure(tiny(), Dropping(), windows(), level=shapes, progress=False)
    assert {row["mode"] for row in rows} == {"eager"}


def test_graphs_of_shapes_without_steps_are_refused(tiny, graphs):
    with pytest.raises(UserError, match="no shape has any; take --mode eager"):
        measure(tiny(), HALF, windows(), level=level(Shape(1, 6, 0)), mode="graphs", progress=False)
    assert not graphs[0]


def test_nothing_is_recorded_while_it_is_timed(tiny, graphs, monkeypatch):
    """The buffers grow within the first pass, and recordings over shorter ones are made again in
    the second: neither is timed."""
    counts, asked = [], []
    interleave = pairing.interleave

    def counted(functions, *, warmup, **how):
        def run(name):
            functions[name]()
            counts.append(graphs[0][-1]._recorder.recorded)

        asked.append(warmup * len(functions))
        return interleave({name: partial(run, name) for name in functions}, warmup=warmup, **how)

    monkeypatch.setattr(pairing, "interleave", counted)
    over = next(n for n in range(16, 400) if recordings.bucket(n) != recordings.bucket(n + 3))
    tokens, once = torch.randint(3, 90, (1, over)), level(Shape(1, over, 6), texts=1)
    model = tiny(max_position_embeddings=512)
    measure(model, HALF, tokens, level=once, mode="graphs", progress=False)
    assert counts[1] < counts[asked[0] - 1] == counts[-1]


def test_what_cannot_be_recorded_is_refused_before_any_work(tiny, monkeypatch, capsys):
    model = tiny()
    check_recordable(model, "both")
    monkeypatch.setattr(recordings, "obstacle", lambda parts: "its attention has a window")
    for asked in (None, "eager"):
        check_recordable(model, asked)
    for asked in ("graphs", "both"):
        with pytest.raises(UserError, match="recorded: its attention has a window; take --mode"):
            check_recordable(model, asked)
    monkeypatch.setattr(door, "modes_of", lambda *_: MODES)
    assert door.main(["--method", "dense", "--model", "shape:tiny", "--mode", "both"]) == 2
    assert "attention has a window" in capsys.readouterr().err


def test_in_eager_mode_dense_is_not_attached_and_no_mode_is_said(tiny, graphs):
    opened, attached = graphs
    measure(tiny(), HALF, windows(), level=level(Shape(1, 12, 1)), progress=False)
    assert not opened
    assert {method is HALF and mode == "eager" for method, mode in attached} == {True}


def test_what_stands_for_dense_executes_everything(tiny):
    model, tokens = tiny(), windows(2)
    with torch.no_grad():
        expected = model(tokens).logits
        with runtime.attach(model, whole(model)) as trace:
            assert torch.equal(model(tokens).logits, expected)
        totals = trace.totals()
    assert totals["block_flops"] == totals["dense_block_flops"] > 0
