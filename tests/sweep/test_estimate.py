"""The estimate of a dry run: what it says that it assumes."""

from __future__ import annotations

import pytest

from dyndepth.cells.cell import CellSpec
from dyndepth.sweep import estimate
from dyndepth.sweep.grid import Grid
from dyndepth.sweep.settings import Settings


@pytest.mark.parametrize(("method", "says"), [("oracle", True), ("exit_oracle", False)])
def test_trying_routes_is_said_to_be_left_out(tiny, monkeypatch, capsys, method, says):
    monkeypatch.setattr(estimate, "skeleton", lambda settings: tiny())
    monkeypatch.setattr(estimate, "measured_rate", lambda device, dtype: 1e9)
    cells = [CellSpec("dense"), CellSpec(method, target_speedup=2.0)]
    estimate.print_estimate(Settings(device="cpu"), Grid(tuple(cells), {"choice": None}))
    assert ("comes on top; trying a bound's routes comes on top" in capsys.readouterr().out) is says
