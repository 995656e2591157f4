"""Micro-batches merged by the memory that is there: a fake one, on any device."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from dyndepth.fitting import filling, loop
from dyndepth.fitting.filling import Filling, merged
from dyndepth.fitting.loop import Schedule, checkpoints, optimise

SCHEDULE = Schedule(steps=4, batch=2, length=4, accumulate=12)


class FakeMemory:
    """Room for so many micro-batches as one is told; keeps what it was asked."""

    def __init__(self, room: float) -> None:
        self.fits, self.asked = room, []

    def begin(self) -> None:
        self.asked.append("begin")

    def room(self) -> float:
        self.asked.append("room")
        return self.fits

    def release(self) -> None:
        self.asked.append("release")


@pytest.fixture
def room(monkeypatch):
    """``room(fits)``: training finds a memory of that room."""

    def given(fits: float) -> FakeMemory:
        memory = FakeMemory(fits)
        monkeypatch.setattr(loop, "memory_of", lambda device: memory)
        return memory

    return given


def fit(schedule=SCHEDULE, most=None, stop_at=None, noise=0.0):
    """A linear fit; returns weight, curve, and (step, windows) of each call of the objective.

    ``most`` windows at a time are all that fit.
    """
    weight = torch.nn.Parameter(torch.zeros(4))
    windows = torch.arange(schedule.windows * 4).view(-1, 4) % 7
    calls = []

    def objective(ids, step):
        calls.append((step, len(ids)))
        if step == stop_at:
            raise KeyboardInterrupt
        if most is not None and len(ids) > most:
            raise torch.OutOfMemoryError("out of memory")
        wanted = 1 + noise * torch.randn(())
        loss = ((ids.float() / 7 * weight).sum(1) - wanted).square().mean()
        return loss, {"loss": loss.detach(), "windows": float(len(ids))}

    groups = [{"params": [weight], "lr": 0.05}]
    curve = optimise(objective, groups, windows, schedule, name="fit", progress=False)
    return weight.detach(), curve, calls


@pytest.mark.parametrize(
    ("parts", "fits", "expected"),
    [(12, 0.4, 1), (12, 1.9, 1), (12, 5.9, 4), (12, 6, 6), (12, 1e9, 12), (7, 6.9, 1), (1, 9, 1)],
)
def test_merged_is_the_largest_divisor_that_fits(parts, fits, expected):
    assert merged(parts, fits) == expected


def test_a_processor_takes_the_recipe_as_it_is():
    assert filling.memory_of(torch.device("cpu")) is None
    assert {call[1] for call in fit()[2]} == {2}


def test_the_first_step_is_measured_and_later_ones_are_merged(room):
    memory = room(4.5)
    _, curve, calls = fit()
    assert calls == [(0, 2)] * 12 + [(step, 8) for step in (1, 2, 3) for _ in range(3)]
    assert memory.asked == ["begin", "room"]
    assert [row["tokens"] for row in curve] == [96.0, 192.0, 288.0, 384.0]
    assert [row["windows"] for row in curve] == [2, 8, 8, 8]


def test_merged_micro_batches_have_the_gradient_of_single_ones(room):
    single = fit()
    room(100)
    together = fit()
    assert len(together[2]) == 12 + 3
    torch.testing.assert_close(together[0], single[0])
    for mine, theirs in zip(together[1], single[1], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_short_memory_halves_until_it_fits(room):
    memory = room(100)
    weight, curve, calls = fit(most=6)
    assert calls[12:15] == [(1, 24), (1, 12), (1, 6)]
    assert {call[1] for call in calls[15:]} == {6}
    assert memory.asked == ["begin", "room", "release", "release"]
    assert len(curve) == 4
    torch.testing.assert_close(weight, fit()[0])


def test_memory_that_is_short_midway_leaves_no_half_step(room, monkeypatch):
    """The third group fails once: what the first two have added is taken back."""
    expected = fit()
    room(4)
    once = []
    backward = torch.Tensor.backward

    def struck(self, *given, **named):
        once.append(1)
        if len(once) == 12 + 3:
            raise torch.OutOfMemoryError("out of memory")
        return backward(self, *given, **named)

    monkeypatch.setattr(torch.Tensor, "backward", struck)
    weight, _, calls = fit()
    assert [windows for step, windows in calls if step == 1] == [8, 8, 8] + [4] * 6
    torch.testing.assert_close(weight, expected[0])


def test_one_micro_batch_that_does_not_fit_is_an_error(room):
    for memory in (None, FakeMemory(100)):
        assert Filling(12, memory).less() is False
    room(100)
    with pytest.raises(torch.OutOfMemoryError):
        fit(most=1)


def test_a_killed_training_merges_as_before(room, tmp_path, monkeypatch):
    """What is drawn at random is drawn for those that are merged, so they must stay the same."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    room(4)
    expected = fit(noise=0.1)
    with checkpoints(tmp_path):
        with pytest.raises(KeyboardInterrupt):
            fit(noise=0.1, stop_at=2)
        memory = room(12)
        weight, curve, calls = fit(noise=0.1)
    assert memory.asked == []
    assert {call[1] for call in calls} == {8}
    assert torch.equal(weight, expected[0])
    assert curve == expected[1]


def test_the_seed_is_that_of_the_first_micro_batch(room, monkeypatch):
    seeds = []

    def recorded(seed, device):
        seeds.append(seed)
        return nullcontext()

    monkeypatch.setattr(loop, "seeded", recorded)
    room(6)
    fit(Schedule(steps=2, batch=2, length=4, accumulate=6))
    assert seeds == [0, 1, 2, 3, 4, 5, 6]
