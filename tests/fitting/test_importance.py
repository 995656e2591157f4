"""Importance of units: each criterion against a few independent lines, the cache, the command."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from conftest import DEVICE
from folders import tiny_folder
from gating import GivenPlan
from torch.nn.functional import cosine_similarity, cross_entropy

from dyndepth import importance as importance_command
from dyndepth.common.errors import UserError
from dyndepth.data.corpus import Corpus
from dyndepth.fitting import importance, removal, unit_scores
from dyndepth.fitting.importance import CRITERIA, Settings, rank
from dyndepth.fitting.removal import plan_without, units_of
from dyndepth.fitting.unit_scores import streams, taylor
from dyndepth.runtime import many_plans
from dyndepth.runtime.attach import attach

FAMILIES = ("llama", "qwen3")
WINDOWS, LENGTH = 3, 24
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "importance"


@pytest.fixture
def ids(tiny_corpus):
    """The windows that ``ranking`` reads."""
    return tiny_corpus.windows(LENGTH, WINDOWS, 0, split="calibration").to(DEVICE)


def ranking(model, corpus, criterion, unit=None, **more):
    run = {key: more.pop(key) for key in ("until", "run") if key in more}
    settings = Settings(criterion=criterion, unit=unit, windows=WINDOWS, length=LENGTH, **more)
    return rank(model, corpus, settings, progress=False, **run)


@torch.no_grad()
def raw_streams(model, ids):
    """Streams before block 0, after its attention, after its MLP = before block 1, and so on."""
    found = []
    layers = model.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))]
    for layer in layers:
        hooks += [
            layer.self_attn.register_forward_hook(lambda _, __, out: found.append(out[0])),
            layer.mlp.register_forward_hook(lambda _, __, out: found.append(out)),
        ]
    model(ids)
    for hook in hooks:
        hook.remove()
    stream, points = found[0], [found[0]]
    for update in found[1:]:
        stream = stream + update
        points.append(stream)
    return points


def by_score(scores, units):
    return [units[i] for i in sorted(range(len(units)), key=lambda i: scores[i])]


@every_family
def test_block_influence_is_of_the_raw_stream(tiny, tiny_corpus, ids, family):
    model = tiny(family)
    points = raw_streams(model, ids)[::2]
    expected = [
        1 - cosine_similarity(before, after, dim=-1).mean().item()
        for before, after in zip(points, points[1:], strict=False)
    ]
    found = ranking(model, tiny_corpus, "block_influence")
    assert found.order == by_score(expected, units_of(4, "block"))
    assert found.scores == pytest.approx(sorted(expected), abs=1e-6)
    # The reference scores the last block against what the final norm makes of it.
    hidden = model(ids, output_hidden_states=True).hidden_states
    inflated = 1 - cosine_similarity(hidden[-2], hidden[-1], dim=-1).mean().item()
    assert dict(zip(found.order, found.scores, strict=True))[6, 7] != pytest.approx(inflated)
    inner = 1 - cosine_similarity(hidden[1], hidden[2], dim=-1).mean().item()
    assert inner == pytest.approx(expected[1], abs=1e-6)


@every_family
def test_sublayer_cosines(tiny, tiny_corpus, ids, family):
    model = tiny(family)
    points = raw_streams(model, ids)
    expected = [
        1 - cosine_similarity(before, after, dim=-1).mean().item()
        for before, after in zip(points, points[1:], strict=False)
    ]
    units = units_of(4, "sublayer")
    joint = ranking(model, tiny_corpus, "joint")
    assert joint.order == by_score(expected, units)
    assert joint.scores == pytest.approx(sorted(expected), abs=1e-6)
    for name, first in (("attention", 0), ("mlp", 1)):
        assert ranking(model, tiny_corpus, name).order == by_score(
            expected[first::2], units[first::2]
        )


def test_angles_are_of_runs_at_the_last_token(tiny, tiny_corpus, ids):
    model = tiny()
    points = [point[:, -1] for point in raw_streams(model, ids)[::2]]
    for run in (1, 2, 3, 4):
        expected = [
            sum(
                math.acos(float(a @ b / a.norm() / b.norm())) / math.pi
                for a, b in zip(points[first], points[first + run], strict=True)
            )
            / WINDOWS
            for first in range(5 - run)
        ]
        found = ranking(model, tiny_corpus, "angular", run=run)
        assert found.order == by_score(expected, units_of(4, "block")[: 5 - run])
        assert found.scores == pytest.approx(sorted(expected), abs=1e-5)
    ends = ranking(model, tiny_corpus, "angular", run=2, keep_last=1)
    assert sorted(ends.order) == [(0, 1), (2, 3)]


@pytest.mark.parametrize("unit", ["block", "sublayer"])
def test_perplexity_is_the_loss_without_each(tiny, tiny_corpus, ids, unit):
    model, units = tiny(), units_of(4, unit)
    expected = []
    for each in units:
        with attach(model, GivenPlan(plan=plan_without(4, [each]).tolist())):
            logits = model(ids).logits
        expected.append(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item())
    found = ranking(model, tiny_corpus, "perplexity", unit, keep_first=0, keep_last=0)
    assert found.order == by_score(expected, units)
    assert found.scores == pytest.approx(sorted(expected), abs=1e-5)
    inner = ranking(model, tiny_corpus, "perplexity", unit, keep_first=1, keep_last=2)
    assert {place // 2 for each in inner.order for place in each} == {1}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_taylor_is_autograd_by_hand(tiny, tiny_corpus, ids, family):
    model = tiny(family)
    reference = tiny(family).requires_grad_(True)
    reference(ids, labels=ids).loss.backward()
    expected = []
    for layer in reference.model.layers:
        for first in (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm")):
            salience = [
                (parameter * parameter.grad).abs().sum().item()
                for name, parameter in layer.named_parameters()
                if name.startswith(first) and name.endswith("weight")
            ]
            expected.append(sum(salience))
    assert len(salience) == 4
    found = [value for row in taylor(model, ids, progress=False) for value in row]
    assert found == pytest.approx(expected, rel=1e-4)
    blocks = [a + b for a, b in zip(expected[::2], expected[1::2], strict=True)]
    free = {"keep_first": 0, "keep_last": 0}
    by_block = ranking(model, tiny_corpus, "taylor", **free)
    assert by_block.order == by_score(blocks, units_of(4, "block"))
    by_sublayer = ranking(model, tiny_corpus, "taylor", "sublayer", **free)
    assert by_sublayer.order == by_score(expected, units_of(4, "sublayer"))


def test_taylor_leaves_the_model_as_it_was(tiny, ids, monkeypatch):
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    model.model.layers[1].mlp.up_proj.weight.grad = torch.ones(64, 32, device=DEVICE)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]

    def unchanged():
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(torch.equal(state[name], model.state_dict()[name]) for name in state)
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert len(grads) == 1
        assert grads[0].eq(1).all()
        assert not model.training

    with torch.no_grad():
        taylor(model, ids, progress=False)
    unchanged()
    monkeypatch.setattr(unit_scores, "loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        taylor(model, ids[:2], progress=False)
    unchanged()


def test_what_is_kept_is_bound_to_the_code_that_measured_it(tiny, tiny_corpus, ids, monkeypatch):
    asked = []
    monkeypatch.setattr("dyndepth.common.digests.fitting_code", lambda *of: asked.append(of) or "")
    streams(tiny(), ids, progress=False)
    taylor(tiny(), ids, progress=False)
    ranking(tiny(), tiny_corpus, "greedy", until=0.9)
    removal.cached_order(tiny(), ids, torch.full((3, 2), 1 / 6), 0.9)
    assert [of for (of,) in asked] == [
        "dyndepth.fitting.unit_scores",
        "dyndepth.fitting.unit_scores",
        "dyndepth.fitting.importance",
        "dyndepth.fitting.removal",
    ]


def test_greedy_follows_the_search(tiny, tiny_corpus, ids):
    found = ranking(tiny(), tiny_corpus, "greedy", until=0.0, keep_first=0, keep_last=0)
    alone = ranking(tiny(), tiny_corpus, "perplexity", keep_first=0, keep_last=0)
    assert found.order[0] == alone.order[0]
    assert found.scores[0] == pytest.approx(alone.scores[0])
    assert len(found.order) == 3
    ends = ranking(tiny(), tiny_corpus, "greedy", until=0.0)
    assert sorted(ends.order) == [(2, 3), (4, 5)]
    lazy = ranking(tiny(), tiny_corpus, "greedy", "sublayer", until=0.7, search="lazy")
    assert {place // 2 for each in lazy.order for place in each} <= {1, 2}


def test_orders_without_text(tiny):
    assert ranking(tiny(), None, "last").order == units_of(4, "block")[::-1]
    assert ranking(tiny(), None, "last", "sublayer").order == units_of(4, "sublayer")[::-1]
    orders = [tuple(ranking(tiny(), None, "random", seed=seed).order) for seed in range(20)]
    assert {sorted(order)[0] for order in orders} == {(2, 3)}, "first and last block are kept"
    assert len(set(orders)) == 2
    assert orders[0] == tuple(ranking(tiny(), None, "random").order)


def test_protection_shrinks_on_small_models():
    assert Settings(criterion="perplexity").keep(30) == (4, 2)
    assert Settings(criterion="perplexity").keep(8) == (2, 1)
    assert Settings(criterion="taylor").keep(4) == (1, 0)
    assert Settings(criterion="greedy").keep(4) == (1, 1)
    assert Settings(criterion="greedy").keep(1) == (0, 0)
    assert Settings(criterion="last").keep(4) == (0, 0)
    assert Settings(criterion="last", keep_first=3).keep(4) == (3, 0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"criterion": "joint", "unit": "block"}, "joint ranks sublayers only, .* not block"),
        ({"criterion": "angular", "unit": "sublayer"}, "angular ranks blocks only"),
        ({"windows": 0}, "windows must be at least 1, not 0"),
        ({"length": 1}, "length must be at least 2, not 1"),
        ({"keep_last": -1}, "keep_last must be at least 0"),
    ],
)
def test_what_does_not_go_together_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**given)


def test_unknown_criterion_and_no_text(tiny, tiny_corpus):
    with pytest.raises(UserError, match="'greddy'; did you mean greedy"):
        Settings(criterion="greddy")
    with pytest.raises(UserError, match="taylor reads text; give a corpus"):
        rank(tiny(), None, Settings(criterion="taylor"))
    with pytest.raises(UserError, match="too short"):
        rank(tiny(), tiny_corpus, Settings(windows=1000))


class TestCache:
    def test_one_dense_pass_serves_all_cosines(self, tiny, tiny_corpus, cache, monkeypatch):
        model, passes = tiny(), []
        model.model.register_forward_hook(lambda *_: passes.append(1))
        for name in ("block_influence", "angular", "attention", "mlp", "joint"):
            ranking(model, tiny_corpus, name)
        assert len(passes) == 1
        assert len(list(cache.iterdir())) == 1

    def test_other_text_model_or_dtype_is_measured_apart(self, tiny, tiny_corpus, cache):
        one = ranking(tiny(), tiny_corpus, "joint").scores
        assert ranking(tiny(), tiny_corpus, "joint", seed=1).scores != one
        assert ranking(tiny(seed=1), tiny_corpus, "joint").scores != one
        assert ranking(tiny().bfloat16(), tiny_corpus, "joint").scores != one
        assert len(list(cache.iterdir())) == 4

    @pytest.mark.parametrize("garbled", ["{", "[1, 2]", '{"block": [1], "angles": []}', "null"])
    def test_a_garbled_file_is_made_again(self, tiny, ids, cache, garbled):
        found = streams(tiny(), ids, progress=False)
        (file,) = cache.iterdir()
        whole = file.read_text()
        file.write_text(garbled)
        assert streams(tiny(), ids, progress=False) == found
        assert file.read_text() == whole
        assert [each.name for each in cache.iterdir()] == [file.name]

    def test_a_search_is_continued(self, tiny, tiny_corpus, monkeypatch):
        tried, stock = [], many_plans.losses
        counted = lambda model, plans, ids: tried.append(len(plans)) or stock(model, plans, ids)  # noqa: E731
        monkeypatch.setattr(removal, "losses", counted)
        free = {"keep_first": 0, "keep_last": 0}
        first = ranking(tiny(), tiny_corpus, "greedy", until=0.75, **free).order
        assert tried == [5]
        whole = ranking(tiny(), tiny_corpus, "greedy", until=0.4, **free).order
        assert tried == [5, 3, 2]
        assert whole[:1] == first
        assert ranking(tiny(), tiny_corpus, "greedy", until=0.6, **free).order == whole
        assert tried == [5, 3, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


class TestCommand:
    @pytest.fixture
    def command(self, folder, capsys):
        def run(*arguments):
            common = ("--model", str(folder / "model"), "--corpus", str(folder / "corpus.txt"))
            small = ("--windows", "2", "--length", "16", "--device", "cpu")
            given = [*common, *small] if "--model" not in arguments else small
            status = importance_command.main([*arguments, *given])
            return status, *capsys.readouterr()

        return run

    def test_prints_and_writes(self, command, tmp_path):
        out = tmp_path / "out"
        status, text, _ = command("joint", "greedy", "last", "--output-path", str(out))
        assert status == 0
        rows = list(csv.DictReader((out / "importance.csv").open()))
        assert tuple(rows[0]) == importance_command.COLUMNS
        # Greedy keeps two of four blocks, and one removal reaches two thirds.
        assert [row["criterion"] for row in rows] == ["joint"] * 8 + ["greedy"] * 2 + ["last"] * 4
        assert {row["sublayer"] for row in rows[:8]} == {"attention", "mlp"}
        assert [(row["layer"], row["rank"]) for row in rows[-4:]] == list(
            zip("0123", "4321", strict=True)
        )
        assert (out / "importance.png").read_bytes().startswith(b"\x89PNG")
        assert "Importance of sublayers" in text
        assert "Importance of blocks" in text
        summary = json.loads(text.splitlines()[-1])["importance"]
        assert summary["first_to_go"]["last"] == ["block 3", "block 2", "block 1", "block 0"]

    def test_ranks_by_what_is_cheap_if_nothing_is_named(self, command):
        status, text, _ = command("--unit", "sublayer")
        assert status == 0
        summary = json.loads(text.splitlines()[-1])["importance"]
        assert list(summary["first_to_go"]) == ["perplexity", "taylor", "joint"]
        assert not set(importance_command._UNASKED) - set(CRITERIA)

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (("greddy",), "unknown criterion 'greddy'; did you mean greedy?"),
            (("joint", "--unit", "block"), "joint ranks sublayers only"),
            (("angular", "--run", "5"), "a run holds 1 to 4 blocks on this model, not 5"),
            (("angular", "--run", "3", "--keep_first", "2"), "a run holds 1 to 2 blocks"),
            (("greedy", "--keep_first", "4"), "all 4 blocks are kept"),
            (("greedy", "--until", "0"), "--until takes a share above 0"),
            (("joint", "--model", "no/such/folder"), "no model folder"),
            (("joint", "--threads", "0"), "--threads takes a whole number"),
            (("--nonsense",), "there is no flag --nonsense"),
        ],
    )
    def test_wrong_input_is_one_sentence(self, command, arguments, sentence):
        status, _, err = command(*arguments)
        assert status == 2
        assert sentence in err
        assert len(err.strip().splitlines()) == 1

    def test_goes_together_with_the_scores_of_a_recovery(self, command, folder, tmp_path):
        from dyndepth import fit

        common = ("--methods", "dense", "--speedups", "1", "--device", "cpu")
        common += ("--model", str(folder / "model"), "--corpus", str(folder / "corpus.txt"))
        recipe = "lora(steps=2, batch=1, length=16, modules=ila, score_steps=2)"
        output = ("--recovery", recipe, "--output_path", str(tmp_path))
        assert fit.main([*common, *output]) == 0
        ranked = ("--adapter", str(tmp_path / "recovery"))
        status, text, _ = command("block_influence", "joint", *ranked)
        assert status == 0
        assert "Mean score of a recovery's modules" in text
        assert "Spearman's rank correlation with block_influence: " in text
        found = json.loads(text.splitlines()[-1])["importance"]["agreement"]
        assert [(name, each["n"]) for name, each in found.items()] == [
            ("block_influence", 4),
            ("joint", 8),
        ]
        assert -1 <= found["joint"]["low"] <= found["joint"]["rho"] <= found["joint"]["high"] <= 1
        assert found["block_influence"]["low"] is None  # four blocks are too few
        card = tmp_path / "recovery" / "recovery.json"
        plain = json.loads(card.read_text())
        del plain["significance"]
        card.write_text(json.dumps(plain))
        status, _, err = command("joint", *ranked)
        assert status == 2
        assert "has no scores; recover with modules=ila" in err

    def test_too_little_text_is_told(self, command, folder, tmp_path):
        (tmp_path / "short.txt").write_text("one text\n\nanother text")
        model = ("--model", str(folder / "model"), "--corpus", str(tmp_path / "short.txt"))
        status, _, err = command("joint", *model)
        assert status == 2
        assert "the corpus is too short" in err

    def test_an_unsupported_model_is_told(self, command, folder, tmp_path):
        from transformers import MambaConfig

        config = MambaConfig(architectures=["MambaForCausalLM"])
        config.save_pretrained(tmp_path / "other")
        corpus = ("--corpus", str(folder / "corpus.txt"))
        status, _, err = command("joint", "--model", str(tmp_path / "other"), *corpus)
        assert status == 2
        assert "architecture 'mamba' is not supported" in err
        assert len(err.strip().splitlines()) == 1


def test_corpus_is_calibration_text(tiny, tiny_corpus):
    """Nothing of the training split is read."""
    settings = Settings(windows=WINDOWS, length=LENGTH)
    ids = importance.calibration_text(tiny(), tiny_corpus, settings)
    assert isinstance(tiny_corpus, Corpus)
    assert torch.equal(ids, tiny_corpus.windows(LENGTH, WINDOWS, 0, split="calibration").to(DEVICE))
