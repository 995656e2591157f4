"""The shared optimisation loop: schedule, accumulation, checkpoints, several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dyndepth.common.errors import UserError
from dyndepth.fitting import loop
from dyndepth.fitting.loop import Schedule, checkpoints, optimise

SCHEDULE = Schedule(steps=12, batch=2, length=4)


def noisy_fit(schedule=SCHEDULE, stop_at=None, seed=0):
    """A linear fit whose loss depends on random noise; returns the parameter and the curve."""
    weight = torch.nn.Parameter(torch.zeros(4))
    windows = torch.arange(schedule.windows * 4).view(-1, 4) % 7

    def objective(ids, step):
        if step == stop_at:
            raise KeyboardInterrupt
        loss = ((ids.float() / 7 * weight).sum(1) - 1 + 0.1 * torch.randn(len(ids))).square().mean()
        return loss, {"loss": loss.item()}

    groups = [{"params": [weight], "lr": 0.05}]
    curve = optimise(objective, groups, windows, schedule, name="fit", seed=seed, progress=False)
    return weight.detach(), curve


def test_rate_rises_then_falls():
    schedule = Schedule(steps=100, batch=1, length=2, warm_up=0.1)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.001
    constant = Schedule(steps=100, batch=1, length=2, warm_up=0.1, decay="constant")
    assert [constant.rate(step) for step in (0, 9, 99)] == pytest.approx([0.1, 1.0, 1.0])


def test_the_curve_has_a_row_a_step_and_counts_tokens():
    _, curve = noisy_fit()
    assert [row["tokens"] for row in curve] == [8.0 * n for n in range(1, 13)]
    assert sum(row["loss"] for row in curve[-3:]) < sum(row["loss"] for row in curve[:3])


def test_accumulated_micro_batches_are_one_large_batch(monkeypatch):
    """Equal windows and no noise: the gradient is the mean over all micro-batches."""
    monkeypatch.setattr(torch, "randn", lambda n: torch.zeros(n))
    whole, _ = noisy_fit(Schedule(steps=6, batch=4, length=4))
    parts, _ = noisy_fit(Schedule(steps=6, batch=2, length=4, accumulate=2))
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("stop_at", [1, 7, 11])
def test_a_killed_training_goes_on_with_the_same_curve(tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    expected = noisy_fit()
    with checkpoints(tmp_path):
        with pytest.raises(KeyboardInterrupt):
            noisy_fit(stop_at=stop_at)
        assert (tmp_path / "fit.checkpoint").is_file()
        weight, curve = noisy_fit()
        assert torch.equal(weight, expected[0])
        assert curve == expected[1]
        assert noisy_fit(stop_at=0)[1] == expected[1], "a finished training was repeated"


def test_randomness_is_the_steps_own_and_the_callers_stays(monkeypatch):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = noisy_fit()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    second = noisy_fit()
    assert first[1] == second[1]
    assert noisy_fit(seed=1)[1] != first[1]


def test_unusable_checkpoints_are_refused_in_a_sentence(tmp_path):
    file = tmp_path / "fit.checkpoint"
    with checkpoints(tmp_path):
        for content in (b"garbage", pickled()):
            file.write_bytes(content)
            with pytest.raises(UserError, match="remove it to start over"):
                noisy_fit()


def pickled() -> bytes:
    import pickle

    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    return pickle.dumps(Bomb())


def test_too_few_windows_and_a_lost_loss_are_told():
    weight = torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [weight], "lr": 0.1}]

    def lost(ids, step):
        return weight.sum() * float("nan"), {}

    with pytest.raises(UserError, match="reads 24 windows, 3 were given"):
        optimise(lost, groups, torch.zeros(3, 4), SCHEDULE, name="fit", progress=False)
    with pytest.raises(FloatingPointError, match="step 0 is not a number"):
        optimise(lost, groups, torch.zeros(24, 4), SCHEDULE, name="fit", progress=False)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    """Through accelerate, on the processor: windows are shared out, gradients averaged."""
    script = Path(__file__).parents[1] / "helpers" / "two_processes.py"
    alone = [sys.executable]
    together = [*alone, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = []
    for launcher in (alone, together):
        out = tmp_path / f"{len(found)}.json"
        subprocess.run([*launcher, str(script), str(out)], check=True, timeout=240)
        found.append(json.loads(out.read_text()))
    assert found[0]["processes"] == 1
    assert found[1]["processes"] == 2
    assert found[0]["weight"] == pytest.approx(found[1]["weight"], rel=1e-5)
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
