"""What training asks the device for, and when: numbers late, and nothing inside a step."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, make_tiny
from torch.utils._python_dispatch import TorchDispatchMode

import dyndepth
from dyndepth.fitting import loop
from dyndepth.fitting.loop import Schedule, checkpoints, optimise
from dyndepth.fitting.readings import Speed
from dyndepth.fitting.routers import Tuning, tune_router
from dyndepth.methods.layer_controller import BlockRouter
from dyndepth.methods.skipgpt.router import LinearRouter, MLPRouter

ROOT = Path(dyndepth.__file__).parents[1]
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")


class Reads(TorchDispatchMode):
    """Counts by which line of this project the host asked for a tensor's value.

    An index by a mask is one: how many it selects has to be known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        if name in READS or masks:
            self._note()
        return function(*args, **kwargs or {})

    def _note(self) -> None:
        frame = sys._getframe(2)
        while frame is not None and "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        file = Path(frame.f_code.co_filename)
        # What the optimiser, accelerate and the stock model read is theirs.
        inside = ROOT / "dyndepth" in file.parents or ROOT / "methods" in file.parents
        if inside:
            self.lines[f"{file.name}:{frame.f_lineno}"] += 1


def routers():
    statistics = torch.zeros(4, 32), torch.ones(4, 32)
    zeros, bias = torch.zeros(4, 2, 32), torch.full((4, 2), 0.3)
    inner = torch.full((4, 2, 8, 32), 0.01)
    return {
        "linear": LinearRouter(zeros, bias, normalise=True, statistics=statistics),
        "mlp": MLPRouter(inner, zeros[..., :8], zeros[..., :8], bias, normalise=True),
        "block": BlockRouter(zeros[:, :1], bias[:, :1], normalise=True),
    }


@pytest.mark.parametrize("kind", ["linear", "mlp", "block"])
@pytest.mark.parametrize("objective", ["ce", "kl"])
@pytest.mark.parametrize("estimator", ["deterministic", "gumbel"])
@pytest.mark.parametrize("phases", ["both", "generation"])
def test_the_host_asks_for_nothing_inside_a_step(tiny_corpus, kind, objective, estimator, phases):
    schedule = Schedule(steps=3, batch=2, length=16, accumulate=2)
    tuning = Tuning(
        target_speedup=1.5, objective=objective, estimator=estimator, phases=phases, ramp=0.5
    )
    windows = tiny_corpus.windows(16, schedule.windows, 0)
    with Reads() as reads:
        curve = tune_router(
            make_tiny(), routers()[kind].to(DEVICE), windows, tuning, schedule, progress=False
        )
    assert len(curve) == 3
    # The executed share before the first step, once.
    assert sum(reads.lines.values()) == 1, reads.lines
    assert all(line.startswith("routers.py") for line in reads.lines), reads.lines


@pytest.mark.parametrize(
    "line", ["ones.sum().item()", "bool(ones.all())", "ones[ones > 0]", "(ones > 0).nonzero()"]
)
def test_reads_are_seen(line):
    """The test above can fail."""
    code = compile(line, str(ROOT / "dyndepth" / "made_up.py"), "exec")
    with Reads() as reads:
        exec(code, {"ones": torch.ones(2)})
    assert reads.lines == {"made_up.py:1": 1}


def late(steps=5, lost=None, log=None, progress=False, name="fit"):
    """A fit whose loss is lost at one step; ``log`` gets what happens in order."""
    # The stand-in's tensors can't be kept.
    device = DEVICE if DEVICE.type == "cuda" else "cpu"
    weight = torch.nn.Parameter(torch.zeros(2, device=device))
    log = [] if log is None else log

    def objective(ids, step):
        log.append(f"queue {step}")
        loss = (weight - step).square().sum()
        if step == lost:
            loss = loss * float("nan")
        return loss, {"loss": loss.detach(), "wanted": 0.5, "half": loss.detach().bfloat16()}

    groups = [{"params": [weight], "lr": 0.1}]
    schedule = Schedule(steps=steps, batch=2, length=3)
    windows = torch.zeros(schedule.windows, 3, dtype=torch.long)
    return optimise(objective, groups, windows, schedule, name=name, progress=progress)


def test_a_step_is_read_when_the_next_is_queued(monkeypatch):
    log, row = [], loop.Reading.row

    def noted(self):
        log.append(f"read {self.step}")
        return row(self)

    monkeypatch.setattr(loop.Reading, "row", noted)
    curve = late(steps=3, log=log)
    assert log == ["queue 0", "queue 1", "read 0", "queue 2", "read 1", "read 2"]
    assert [list(each) for each in curve] == [["loss", "wanted", "half", "tokens"]] * 3
    assert [each["wanted"] for each in curve] == [0.5] * 3
    assert [each["half"] for each in curve] == pytest.approx(
        [each["loss"] for each in curve], rel=0.01
    )


@pytest.mark.parametrize("lost", [0, 2, 4])
def test_a_lost_loss_is_told_with_its_step_and_never_kept(tmp_path, monkeypatch, lost):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    with checkpoints(tmp_path), pytest.raises(FloatingPointError, match=f"^fit: .* step {lost} "):
        late(lost=lost)
    files = list(tmp_path.glob("*.checkpoint"))
    assert len(files) == (lost > 0)
    for file in files:
        kept = torch.load(file, map_location="cpu", weights_only=True)
        assert len(kept["curve"]) == lost
        assert all(value.isfinite().all() for value in kept["parameters"])
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 1e9)
    with pytest.raises(FloatingPointError, match=f"step {lost} is not a number"):
        late(lost=lost)


def test_progress_says_what_was_read_last_and_how_fast(capsys):
    late(progress=True, name="routers 1.5x")
    shown = capsys.readouterr().err.split("\r")[-1]
    assert shown.startswith("routers 1.5x: 100%|")
    assert "| 5/5 [" in shown
    for each in (" step/s, loss ", ", wanted 0.500, ", " tokens/s]"):
        assert each in shown, shown


def test_speed_is_that_of_the_last_steps(monkeypatch):
    now = iter([0.0, *range(10, 30)])
    monkeypatch.setattr("dyndepth.fitting.readings.time.monotonic", lambda: float(next(now)))
    speed = Speed(0.0)
    assert speed.after(1000.0) == "100 tokens/s"
    told = [speed.after(1000.0 + 23_400.0 * n) for n in range(1, 20)]
    assert told[-1] == "23.4k tokens/s"


@pytest.mark.parametrize("objective", ["ce", "kl"])
def test_half_precision_models_train_routers_in_full(tiny_corpus, objective):
    """Without autocast: weights in bfloat16, routers and their optimiser in float32."""
    model, router = make_tiny().bfloat16(), routers()["linear"].to(DEVICE)
    schedule = Schedule(steps=2, batch=2, length=16, accumulate=2)
    tuning = Tuning(target_speedup=1.5, objective=objective, ramp=0.5, weight_rate=1e-2)
    windows = tiny_corpus.windows(16, schedule.windows, 0)
    curve = tune_router(model, router, windows, tuning, schedule, progress=False)
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in curve)
    assert len(curve) == 2
    assert {parameter.dtype for parameter in router.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (router.weight != 0).any(-1).all()
