"""Similarity of final hidden states: what it says of a thinned model, and its files."""

from __future__ import annotations

import pytest
import torch
from cells import cell
from conftest import DEVICE
from gating import GivenPlan, plan_without
from torch.nn.functional import cosine_similarity

from dyndepth.common.registry import load_method
from dyndepth.models.blocks import decoder
from dyndepth.routes import recorded
from dyndepth.studies import similarity
from dyndepth.sweep.settings import settings

DOCUMENTS = {"a": list(range(3, 20)), "b": list(range(50, 30, -2))}


def test_dense_is_like_itself_and_a_thinned_model_as_its_hidden_states_say(tiny):
    model = tiny()
    dense = similarity.cosines(model, load_method("dense"), DOCUMENTS)
    assert [row["cosine"] for row in dense.values()] == pytest.approx([1.0, 1.0])
    assert [row["tokens"] for row in dense.values()] == [16, 9]
    method = GivenPlan(plan=plan_without(4, (2, 0), (2, 1)))
    thin = similarity.cosines(model, method, DOCUMENTS)
    assert thin["a"]["flops"] == pytest.approx(0.75 * thin["a"]["dense_flops"])
    pruned = tiny()
    pruned.model.layers = torch.nn.ModuleList(
        [layer for index, layer in enumerate(pruned.model.layers) if index != 2]
    )
    pruned.config.num_hidden_layers = 3
    ids = torch.tensor([DOCUMENTS["a"]], device=DEVICE)
    states = [decoder(m)(ids, use_cache=False).last_hidden_state[0, 1:] for m in (model, pruned)]
    expected = cosine_similarity(states[0].double(), states[1].double(), dim=-1).mean()
    assert thin["a"]["cosine"] == pytest.approx(expected.item(), abs=1e-6)


def test_cells_are_measured_once_and_averaged_over_seeds(tiny, tmp_path, monkeypatch):
    model = tiny()

    class Job:
        def __init__(self, label, key, settings, identity):
            self.identity = identity

        def ready(self, bench):
            from contextlib import nullcontext

            bench.model, bench.tokenizer = model, None
            return nullcontext(load_method("random_skip", target_speedup=2.0, phases="both"))

    monkeypatch.setattr(recorded, "documents", lambda *_: {"a": "", "b": ""})
    monkeypatch.setattr(similarity, "tokens_of", lambda *_: DOCUMENTS)
    monkeypatch.setattr(recorded, "Recording", Job)
    cells = [cell(seed=seed) for seed in (0, 1)]
    assert similarity.point(cells, tmp_path) is None
    similarity.record(cells, settings({}), tmp_path)
    found = similarity.point(cells, tmp_path)
    assert (found.documents, found.seeds) == (("a", "b"), 2)
    assert found.fraction == pytest.approx(0.5)
    assert found.weights.tolist() == [16, 9]
    assert found.cells == tuple(each.key for each in cells)
    monkeypatch.setattr(recorded, "documents", lambda *_: pytest.fail("measured again"))
    similarity.record(cells, settings({}), tmp_path)
