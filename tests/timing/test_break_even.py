"""The break-even of curves whose answer is known, and the command on a tiny model; no test asserts
a speed."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys

import pytest
import torch

from dyndepth.common.errors import UserError
from dyndepth.timing import __main__ as door
from dyndepth.timing.break_even import NOTHING_SKIPPED, Regime, break_even, measure
from dyndepth.timing.jobs import Job

FRACTIONS = (0.1, 0.2, 0.3, 0.5)


def times(curve, rounds=15, noise=0.0, seed=0):
    """Times whose speedup at a fraction is ``curve(fraction)``, on a machine that slows down."""
    draw = random.Random(seed)
    dense = [(1 + each / rounds) for each in range(rounds)]
    thinned = {
        fraction: [one / curve(fraction) * draw.lognormvariate(0, noise) for one in dense]
        for fraction in FRACTIONS
    }
    return dense, thinned


def test_a_known_crossing_is_found():
    found = break_even(*times(lambda fraction: 0.85 + fraction))
    assert found.crossing == pytest.approx(0.15)
    assert (found.low, found.high) == pytest.approx((0.15, 0.15))
    assert found.pays_from == 0.2
    assert str(found) == (
        "pays from 0.2 on, beyond noise; the break-even is 0.15, 95% interval 0.15 to 0.15"
    )


def test_what_never_pays_is_told():
    found = break_even(*times(lambda fraction: 0.9))
    assert (found.crossing, found.low, found.high, found.pays_from) == (1, 1, 1, None)
    assert str(found) == "does not pay within the measured range, 0.1 to 0.5"


def test_what_always_pays_is_told():
    found = break_even(*times(lambda fraction: 1.05 + fraction))
    assert (found.crossing, found.low, found.high, found.pays_from) == (0, 0, 0, 0.1)
    assert str(found) == "pays from the smallest fraction measured on, 0.1"


def test_a_stretch_at_1_is_not_taken_for_a_gain():
    flat = dict(zip(FRACTIONS, (1.0, 1.0, 1.0, 1.2), strict=True))
    noisy = [break_even(*times(flat.__getitem__, noise=0.01, seed=seed)) for seed in range(40)]
    # By chance the end of the stretch lies beyond noise in one of 40.
    assert sum(found.pays_from == 0.5 for found in noisy) >= 36
    assert sum(found.high > 0.28 for found in noisy) >= 34
    exact = break_even(*times(flat.__getitem__))
    assert (exact.crossing, exact.pays_from) == (pytest.approx(0.3), 0.5)


def test_noise_that_breaks_the_order_is_smoothed():
    bumpy = dict(zip(FRACTIONS, (0.9, 1.02, 0.98, 1.3), strict=True))
    found = break_even(*times(bumpy.__getitem__))
    assert found.crossing == pytest.approx(0.3)
    assert found.pays_from == 0.5


def test_gains_that_noise_may_have_made_are_no_gains():
    found = break_even(*times(lambda fraction: 0.99 + 0.04 * fraction, noise=0.1))
    assert found.pays_from is None
    assert "beyond noise; the break-even is" in str(found)


def test_interval_covers_the_crossing():
    held = 0
    for seed in range(100):
        found = break_even(*times(lambda fraction: 0.85 + 0.6 * fraction, noise=0.03, seed=seed))
        assert found.low <= found.crossing <= found.high
        held += found.low <= 0.25 <= found.high
    assert held >= 90


def test_interval_narrows_with_rounds():
    few, many = (
        break_even(*times(lambda fraction: 0.85 + 0.6 * fraction, rounds, 0.03))
        for rounds in (8, 200)
    )
    assert many.high - many.low < (few.high - few.low) / 2


@pytest.mark.parametrize(
    ("dense", "thinned", "message"),
    [
        ([1.0] * 6, {}, "between 0 and 1"),
        ([1.0] * 6, {0.0: [1.0] * 6}, "between 0 and 1"),
        ([1.0] * 6, {1.0: [1.0] * 6}, "between 0 and 1"),
        ([1.0] * 5, {0.5: [1.0] * 5}, "5 rounds have no interval"),
    ],
)
def test_what_has_no_answer_is_refused(dense, thinned, message):
    with pytest.raises(ValueError, match=message):
        break_even(dense, thinned)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only timed runs move: by 1 for dense, else by 0.2 and the executed FLOPs."""
    now = {"now": 0.0}
    run = Job.run

    def timed(job):
        run(job)
        now["now"] += 1.0 if job.method is None else 0.2 + 1 / job.flop_ideal

    monkeypatch.setattr(Job, "run", timed)
    monkeypatch.setattr("dyndepth.timing.pairing.time.perf_counter", lambda: now["now"])


def watched(model, regime, **changes):
    return measure(model, regime, (0.1, 0.5, 0.25), repeats=6, progress=False, **changes)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("sublayers", ["both", "attention", "mlp"])
def test_each_fraction_is_timed_with_what_its_masks_execute(phase, sublayers, tiny, clock):
    curve = watched(tiny(), Regime(phase, 2, 20, sublayers))
    assert list(curve.speedups) == [0.1, 0.25, 0.5]
    ideals = curve.total_speedups
    assert 1 < ideals[0.1] < ideals[0.25] < ideals[0.5] < 2
    for fraction, speedup in curve.speedups.items():
        assert speedup.median == pytest.approx(1 / (0.2 + 1 / ideals[fraction]))
    assert curve.break_even.pays_from == next((f for f in ideals if ideals[f] > 1.25), None)
    steps = 12 if phase == "decode" else 1
    assert curve.times[NOTHING_SKIPPED] == pytest.approx([1 / steps] * 6)


def test_exactly_the_fraction_is_skipped_and_masks_nest():
    from dyndepth.timing.break_even import _masks

    drawn = torch.rand(2, 4, 3, 10, generator=torch.Generator().manual_seed(0))
    few, many = (_masks(drawn, fraction, "both") for fraction in (0.1, 0.5))
    assert few.shape == (4, 2, 3, 10)
    assert [int((~few[:, kind]).sum()) for kind in (0, 1)] == [12, 12]
    assert [int((~many[:, kind]).sum()) for kind in (0, 1)] == [60, 60]
    assert not bool((many & ~few).any())
    attention = _masks(drawn, 0.5, "attention")
    assert torch.equal(attention[:, 0], many[:, 0])
    assert bool(attention[:, 1].all())
    assert bool(_masks(drawn, 0.5, "mlp")[:, 0].all())


def test_a_router_is_run_and_billed(tiny, monkeypatch):
    ran = []
    forward = torch.nn.Sequential.forward
    monkeypatch.setattr(
        torch.nn.Sequential, "forward", lambda self, hidden: ran.append(1) or forward(self, hidden)
    )
    bare = watched(tiny(), Regime("decode", 1, 8)).total_speedups
    assert not ran
    routed = watched(tiny(), Regime("decode", 1, 8, router=16)).total_speedups
    assert ran
    assert all(routed[fraction] < bare[fraction] for fraction in bare)


def test_what_cannot_be_measured_is_told(tiny):
    with pytest.raises(UserError, match="skips none of 32 tokens"):
        measure(tiny(), Regime("prefill", 1, 8), (0.01,), progress=False)
    with pytest.raises(UserError, match="262 tokens are too long for this model of 256"):
        measure(tiny(), Regime("decode", 1, 250), (0.5,), progress=False)


class TestCommandLine:
    def test_a_table_a_sentence_a_file_and_json(self, tiny, tmp_path, capsys, clock):
        folder = str(tmp_path / "model")
        tiny().save_pretrained(folder)
        file = tmp_path / "new" / "curve.csv"
        arguments = ["break-even", "--model", folder, "--length", "20", "--repeats", "6"]
        more = ["--fractions", "0.5", "0.1", "--output-path", str(file)]
        assert door.main([*arguments, *more]) == 0
        out = capsys.readouterr().out
        assert "prefill 1x20, both sublayers: token routing pays from 0.5 on" in out
        assert "decode 1x20, both sublayers: token routing pays from" in out
        rows = json.loads(out.splitlines()[-1])["break_even"]["rows"]
        assert [(row["phase"], row["skipped_fraction"]) for row in rows] == [
            ("prefill", 0.1),
            ("prefill", 0.5),
            ("decode", 0.1),
            ("decode", 0.5),
        ]
        written = list(csv.DictReader(file.open(encoding="utf-8")))
        assert [float(row["wall_speedup"]) for row in written] == pytest.approx(
            [row["wall_speedup"] for row in rows]
        )
        described = {each for names in door.COLUMNS for each in names.split(", ")}
        conditions = list(rows[0])[list(rows[0]).index("device") :]
        assert {*rows[0]} - {*conditions} | {"device ... timing_code"} == described
        assert conditions[-1] == "timing_code"

    def test_help_needs_no_torch_and_describes_the_columns(self):
        code = (
            "import sys; from dyndepth.timing.__main__ import main\n"
            "try: main(['break-even', '--help'])\n"
            "except SystemExit: pass\n"
            "sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "break_even_low, break_even_high: " in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--passes", "training"], "takes one of prefill, decode, not 'training'"),
            (["--batch_size", "0"], "--batch_size takes a whole number of at least 1, not 0"),
            (["--length", "-3"], "--length takes a whole number of at least 1, not -3"),
            (["--repeats", "5"], "--repeats takes a whole number of at least 6, not 5"),
            (["--router", "-1"], "--router takes a whole number of at least 0, not -1"),
            (["--threads", "0"], "--threads"),
            (["--fractions", "0.5", "1"], "--fractions takes numbers between 0 and 1, not '1'"),
            (["--fractions", "nan"], "--fractions takes numbers between 0 and 1, not 'nan'"),
            (["--fractions", "half"], "numbers between 0 and 1, not 'half'"),
            (["--sublayers", "all"], "one of both, attention, mlp, not 'all'"),
            (["--model", "./no/such/model"], "no/such/model"),
            (["--device", "abacus"], "abacus"),
            (["--unknown"], "--unknown"),
            (["--output_path", "."], "is a folder"),
            (["--output_path", __file__ + "/curve.csv"], "is a file; give a folder"),
        ],
    )
    def test_wrong_input_exits_with_2_and_one_sentence(self, arguments, message, capsys):
        assert door.main(["break-even", *arguments]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
