"""Sweeps on a Ray cluster: the same tables, and a machine that is lost in the middle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sweeping
from folders import tiny_folder

from dyndepth.results.tables import NAMES

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SCORES = tuple(name for name in NAMES if name != "timing.csv")
CELLS = ("--methods", "uls,static_pruning,random_skip", "--speedups", "1.3,2", "--seed", "0,1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with ``model``, ``corpus.txt`` and ``inline``, an undisturbed run."""
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    run = _start(folder, folder, "--output_path", "inline")
    assert run.wait() == 0, run.err
    return folder


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of a head without room for cells, and two machines with room for one each."""
    from ray.cluster_utils import Cluster

    # Machines share these two cores with the tests: what starts on them may take its time.
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "180")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield found
    found.shutdown()


def _start(folder: Path, tiny: Path, *more: str) -> sweeping.Sweep:
    base = ("--model", str(tiny / "model"), "--corpus", str(tiny / "corpus.txt"), *CELLS)
    base += ("--tasks", "quartz,last_word", "--limit", "3", "--timing", "off")
    return sweeping.start(folder, *base, *more, OMP_NUM_THREADS="1", **_cache())


def _cache() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k == "DYNDEPTH_CACHE"}


def _equal(one: Path, other: Path) -> None:
    for name in SCORES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_tables_are_those_of_inline(tiny, tmp_path):
    run = _start(tmp_path, tiny, "--executor", "ray", "--workers", "2", "--output_path", "run")
    assert run.wait(150) == 0, run.err
    assert "worker 2" in run.out
    _equal(tmp_path / "run", tiny / "inline")


def test_a_machine_that_is_lost_costs_a_second_try(tiny, tmp_path, cluster):
    # All machines have this one's address, and the sweep sits on the one that was added last.
    lost, _ = (cluster.add_node(num_cpus=1) for _ in range(2))
    more = ("--executor", "ray", "--ray_address", cluster.address, "--output_path", "run")
    run = _start(tmp_path, tiny, *more)
    run.wait_for("[3/", 300)
    cluster.remove_node(lost, allow_graceful=False)
    assert run.wait(150) == 0, run.err
    _equal(tmp_path / "run", tiny / "inline")
    assert "its Ray worker was lost; trying again" in run.err


def test_no_cluster_at_the_address_is_one_sentence(tiny, tmp_path):
    more = ("--executor", "ray", "--ray_address", "127.0.0.1:1", "--output_path", "run")
    run = _start(tmp_path, tiny, *more)
    assert run.wait(150) == 2, run.err
    assert "no Ray cluster answers at --ray_address 127.0.0.1:1" in run.err
    assert not (tmp_path / "run").exists()
