"""Peak memory of calls whose allocations are known."""

from __future__ import annotations

import torch

from dyndepth.timing.jobs import peak_bytes

KILO = 1024 * 4
"""Bytes of 1024 numbers in float32."""


def test_the_peak_is_what_is_held_at_once():
    def run(_):
        first = torch.empty(4 * 1024)
        second = torch.empty(2 * 1024)
        del first
        third = torch.empty(3 * 1024)
        return second, third

    assert peak_bytes(run) == 6 * KILO


def test_what_is_held_before_does_not_count_and_its_release_does():
    def grow(kept):
        for _ in range(2):
            kept[0] = torch.cat([kept[0], torch.empty(1024)])

    # Second growth: 9 old, 1 to add, 10 new, of which 8 were held before.
    assert peak_bytes(grow, prepare=lambda: [torch.empty(8 * 1024)]) == (9 + 1 + 10 - 8) * KILO


def test_nothing_allocated_has_no_peak():
    assert peak_bytes(lambda _: None) == 0


def test_a_gpu_tells_its_own_peak(monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place: told.append("drained"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda place: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda place: told.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda place: 130)
    found = peak_bytes(told.append, "cuda:0", prepare=lambda: "prepared")
    assert found == 30
    assert told == ["drained", "reset", "prepared", "drained"]


def test_other_devices_tell_none():
    """They have memory of their own, which the CPU's allocator says nothing of."""
    ran = []
    assert peak_bytes(ran.append, "meta") is None
    assert not ran
