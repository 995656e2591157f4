"""Static pruning: what is removed, how many units, and that it equals a smaller model."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import DEVICE
from test_attach import ids, incremental

from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method
from dyndepth.fitting.fits import load_fit, save_fit
from dyndepth.fitting.importance import CRITERIA
from dyndepth.fitting.routers import budget_shares
from dyndepth.methods.static_pruning import StaticPruning
from dyndepth.models.blocks import blocks, decoder
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.models.families import FAMILIES
from dyndepth.models.families import family as record_of
from dyndepth.runtime.attach import attach

QUICK = StaticPruning.quick
COMBINATIONS = [(name, unit) for name, one in CRITERIA.items() for unit in one.kinds]
every_combination = pytest.mark.parametrize(("criterion", "unit"), COMBINATIONS)
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))


def fitted(model, corpus, criterion, unit=None, target=1.5, **more):
    method = StaticPruning(target_speedup=target, criterion=criterion, unit=unit, **QUICK, **more)
    return method.fit(model, corpus)


def pruned(model, kept):
    """A copy that has only the blocks ``kept``, as if it had been built so."""
    small = copy.deepcopy(model)
    owner, record = decoder(small), record_of(small)
    layers = getattr(owner, record.layers)
    setattr(owner, record.layers, torch.nn.ModuleList(layers[index] for index in kept))
    for index, layer in enumerate(getattr(owner, record.layers)):
        getattr(layer, record.attention).layer_idx = index
    small.config.num_hidden_layers = len(kept)
    if getattr(small.config, "layer_types", None) is not None:
        small.config.layer_types = [small.config.layer_types[index] for index in kept]
    return small


@families
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kept", [[0, 3], [1, 2, 3], [0, 1, 2], [2]])
def test_skipping_blocks_is_a_smaller_model_bit_for_bit(tiny, family, attn, kept):
    model = tiny(family, attn)
    small = pruned(model, kept)
    method = StaticPruning(target_speedup=1.5)
    method.tensors = {"plan": torch.zeros(4, 2, dtype=torch.bool)}
    method.tensors["plan"][kept] = True
    tokens = ids(2, 14)
    with attach(model, method):
        whole, steps = model(tokens).logits, incremental(model, tokens, prompt=6)
        chosen = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(whole, small(tokens).logits)
    assert torch.equal(steps, incremental(small, tokens, prompt=6))
    assert torch.equal(chosen, small.generate(tokens, max_new_tokens=6, do_sample=False))


@every_combination
def test_each_criterion_fits_skips_and_decodes(tiny, tiny_corpus, criterion, unit):
    model = tiny()
    method = fitted(model, tiny_corpus, criterion, unit, target=1.2)
    plan = method.tensors["plan"]
    assert plan.dtype == torch.bool
    assert plan.shape == (4, 2)
    assert method.facts["criterion"] == criterion
    assert method.facts["unit"] == unit
    removed = {
        (layer, sublayer)
        for layer, name in method.facts["order"]
        for sublayer in {"block": (0, 1), "attention": (0,), "mlp": (1,)}[name]
    }
    assert removed == {(layer, sublayer) for layer, sublayer in (~plan).nonzero().tolist()}
    assert removed
    shares = budget_shares(model, QUICK["length"])
    assert method.facts["achieved_speedup"] == pytest.approx(1 / shares[plan].sum().item())
    tokens = ids(2, 10)
    with attach(model, method):
        whole, steps = model(tokens).logits, incremental(model, tokens, prompt=4)
    torch.testing.assert_close(whole, steps, atol=1e-5, rtol=0)


@every_combination
@pytest.mark.parametrize("target", [1.0, 1.1, 1.3, 1.5, 1.9])
def test_the_count_comes_nearest_to_the_target(tiny, tiny_corpus, criterion, unit, target):
    model = tiny()
    shares = budget_shares(model, QUICK["length"])
    if criterion in ("attention", "mlp"):
        # One of the four sublayers stays.
        reach = 1 / (1 - 0.75 * shares[:, int(criterion == "mlp")].sum().item())
        target = min(target, reach - 1e-4)
    method = fitted(model, tiny_corpus, criterion, unit, target=target)
    plan, order = method.tensors["plan"], method.facts["order"]
    missed = abs(1 / method.facts["achieved_speedup"] - 1 / target)
    if target == 1.0:
        assert plan.all()
        assert not order
    steps = shares.sum(1) if unit == "block" else shares.flatten()
    assert missed <= steps.max() / 2 + 1e-6
    if criterion != "angular" and order:
        # With one unit fewer it would be further away.
        fewer = plan.clone()
        layer, name = order[-1]
        fewer[layer, {"block": slice(None), "attention": 0, "mlp": 1}[name]] = True
        assert abs(shares[fewer].sum().item() - 1 / target) >= missed - 1e-6


def test_angular_removes_the_run_with_the_least_angle(tiny, tiny_corpus):
    from dyndepth.fitting.unit_scores import streams

    model = tiny()
    windows = tiny_corpus.windows(16, 2, 0, split="calibration").to(DEVICE)
    angles = streams(model, windows, progress=False).angles
    method = fitted(model, tiny_corpus, "angular", target=2.0)
    start = min(range(3), key=lambda at: angles[1][at])
    assert [layer for layer, _ in method.facts["order"]] == [start, start + 1]
    ends = fitted(model, tiny_corpus, "angular", target=2.0, keep_first=1, keep_last=1)
    assert [layer for layer, _ in ends.facts["order"]] == [1, 2]


def test_last_is_the_deepest(tiny):
    method = fitted(tiny(), None, "last", target=2.0)
    assert method.facts["order"] == [[3, "block"], [2, "block"]]
    assert method.facts["achieved_speedup"] == pytest.approx(2.0)
    assert fitted(tiny(), None, "last", target=4.0).tensors["plan"].sum() == 2


@families
def test_a_removed_attention_keeps_no_cache(tiny, tiny_corpus, family):
    """Whatever the layer, the first one included, and the logits stay those of one forward."""
    model, tokens = tiny(family), ids(2, 8)
    for criterion, unit in (("attention", "sublayer"), ("last", "block")):
        method = fitted(model, tiny_corpus, criterion, unit, target=1.2)
        for shift in range(4):
            plan = method.tensors["plan"].roll(shift, 0)
            moved = copy.copy(method)
            moved.tensors = {"plan": plan}
            with attach(model, moved):
                out = model.generate(
                    tokens, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
                )
            for layer, keeps in enumerate(plan[:, 0].tolist()):
                keys = getattr(cache_of(out).layers[layer], "keys", None)
                if keeps:
                    window = blocks(model)[layer].window
                    assert keys.shape[-2] == (11 if window is None else min(11, window - 1))
                else:
                    assert keys is None or not keys.numel()


def test_generation_keeps_the_prompt_whole(tiny, tiny_corpus):
    model, tokens = tiny(), ids(1, 8)
    method = fitted(model, tiny_corpus, "last", phases="generation")
    assert method.kv_policy == "prompt_only"
    assert StaticPruning().kv_policy == "drop"
    with attach(model, method):
        prompt = model(tokens, use_cache=True)
        step = model(tokens[:, :1], **{cache_argument(model): cache_of(prompt)}).logits
    dense = model(tokens, use_cache=True)
    assert torch.equal(prompt.logits, dense.logits)
    full = model(tokens[:, :1], **{cache_argument(model): cache_of(dense)}).logits
    assert not torch.equal(step, full)


def test_a_fit_is_kept_and_restored(tiny, tiny_corpus, tmp_path):
    model = tiny()
    method = fitted(model, tiny_corpus, "joint", target=1.3)
    save_fit(method, model, tmp_path / "fit")
    fresh = StaticPruning(target_speedup=1.3, criterion="joint", **QUICK)
    load_fit(fresh, model, tmp_path / "fit")
    assert torch.equal(fresh.tensors["plan"], method.tensors["plan"])
    assert fresh.facts == method.facts


class TestReach:
    def test_bound_by_blocks(self):
        assert StaticPruning().max_speedup(30) == 30
        assert StaticPruning(criterion="greedy").max_speedup(30) == 15
        assert StaticPruning(criterion="perplexity").max_speedup(30) == 5
        assert StaticPruning(keep_first=4).max_speedup(4) == 1
        assert StaticPruning(keep_first=9).max_speedup(4) == 1

    @pytest.mark.parametrize(
        ("criterion", "target", "more"),
        [
            ("attention", 2.5, {}),
            ("last", 5.0, {}),
            ("block_influence", 2.0, {"keep_first": 3}),
            ("angular", 5.0, {}),
            ("greedy", 2.5, {}),
            ("joint", 1.1, {"keep_first": 2, "keep_last": 2}),
        ],
    )
    def test_a_target_out_of_reach_is_told_at_once(
        self, tiny, tiny_corpus, criterion, target, more
    ):
        with pytest.raises(UserError, match=f"a speedup of .*x, not {target:g}x; ask for less"):
            fitted(tiny(), tiny_corpus, criterion, target=target, **more)

    def test_something_always_remains(self, tiny, tiny_corpus):
        assert fitted(tiny(), tiny_corpus, "block_influence", target=4.0).tensors["plan"].sum() == 2
        assert fitted(tiny(), tiny_corpus, "greedy", target=2.0).tensors["plan"].sum() == 4
        shares = budget_shares(tiny(), 16)
        most = 1 / (1 - shares[:3, 0].sum().item())
        plan = fitted(tiny(), tiny_corpus, "attention", target=most).tensors["plan"]
        assert plan.sum(0).tolist() == [1, 4]
        # Where others are protected, all that may go can go.
        target = 1 / (1 - shares[:3, 0].sum().item())
        plan = fitted(tiny(), tiny_corpus, "attention", target=target, keep_first=1).tensors["plan"]
        assert plan[:, 0].tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("static_pruning(criterion=greddy)", "'criterion' .* must be one of .*, not 'greddy'"),
        ("static_pruning(unit=sublayer)", "block_influence ranks blocks only"),
        ("static_pruning(criterion=mlp, unit=block)", "mlp ranks sublayers only"),
        ("static_pruning(keep_first=-1)", "keep_first must be at least 0, not -1"),
        ("static_pruning(windows=0)", "windows must be at least 1"),
        ("static_pruning(search=eager)", "must be one of full, lazy"),
    ],
)
def test_wrong_parameters_are_one_sentence(spec, sentence):
    with pytest.raises(UserError, match=sentence):
        load_method(spec)


def test_text_is_asked_for(tiny):
    with pytest.raises(UserError, match="block_influence reads text; give a corpus"):
        StaticPruning(target_speedup=1.5).fit(tiny())
    assert StaticPruning().fit(tiny()).tensors["plan"].all(), "nothing goes, nothing is read"


def test_without_a_fit_it_says_so(tiny, tiny_corpus):
    model = tiny()
    unfitted = StaticPruning(target_speedup=1.3)
    with pytest.raises(UserError, match="is not fitted"), attach(model, unfitted):
        pass
    with attach(model, StaticPruning()) as trace:  # nothing goes, so there is nothing to choose
        model(torch.tensor([[1, 2, 3]], device=DEVICE))
        assert trace.executed().tolist() == [[1.0, 1.0]] * 4
    fitted = StaticPruning(target_speedup=1.3, windows=2, length=16).fit(model, tiny_corpus)
    deeper = tiny(num_hidden_layers=5)
    with attach(deeper, fitted), pytest.raises(UserError, match="4 blocks, not 5"):
        deeper(torch.tensor([[1, 2, 3]], device=DEVICE))
