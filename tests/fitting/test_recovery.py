"""Recipes, adapters on the disk and in the weights, and stage-2 recovery on tiny models."""

from __future__ import annotations

import csv
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, make_tiny
from gating import GivenPlan, RandomMask, plan_without

from dyndepth.cells.recipe import NONE, PRESETS, Recipe, parse_recoveries, parse_recovery, shortened
from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method, method_class, methods
from dyndepth.fitting import loop
from dyndepth.fitting.fits import CURVE
from dyndepth.fitting.recovery import training
from dyndepth.fitting.recovery.adapters import (
    CARD,
    CONFIG,
    WEIGHTS,
    adaptable,
    adapted,
    load_adapter,
    write_adapter,
)
from dyndepth.fitting.recovery.kept import find_shipped, recover_cached, recovery_key, ship
from dyndepth.fitting.recovery.training import injected, recover, window_loss
from dyndepth.fitting.routers import loss, next_token_loss
from dyndepth.models.families import FAMILIES
from dyndepth.models.fingerprints import fingerprint
from dyndepth.runtime.attach import attach

pytestmark = pytest.mark.skipif(
    DEVICE.type == "standin",
    reason="adapters merge into plain parameters, and the stand-in's are a class of their own",
)
QUICK = Recipe(steps=3, batch=2, length=24, rate=1e-2)
THIN = GivenPlan(plan=plan_without(4, (1, 0), (1, 1), (2, 1)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def snapshot(model):
    """All that a recovery may not change."""
    tensors = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    return tensors, flags, modules, set(vars(model))


def assert_same(before, model):
    tensors, flags, modules, attributes = snapshot(model)
    assert (flags, modules, attributes) == before[1:]
    assert set(tensors) == set(before[0])
    for name, (parameter, place, value) in tensors.items():
        old = before[0][name]
        assert parameter is old[0]
        assert place == old[1]
        assert torch.equal(value, old[2]), name
        assert parameter.grad is None


def random_adapter(folder, model, recipe=QUICK, scale=0.3):
    """An adapter of random factors, written and read again."""
    with injected(model, recipe) as layers:
        shapes = {n: (x.lora_A[training._NAME].weight, x.lora_B[training._NAME].weight)
                  for n, x in layers.items()}  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        factors = {
            name: tuple(scale * torch.randn(f.shape, generator=generator) for f in pair)
            for name, pair in shapes.items()
        }
    folder.mkdir(parents=True)
    facts = {"method": "m", "corpus": "c", "tokens": 1, "seed": 0, "model": fingerprint(model)}
    write_adapter(folder, factors, recipe, facts)
    return load_adapter(folder, model)


# --- recipes ------------------------------------------------------------------------------------


def test_canonical_text_is_whole_and_read_back_equal():
    for text in ("lora", "lora(rank=8, steps=100)", "joint(targets=value)", "lora(preset=paper)"):
        recipe = parse_recovery(text)
        assert parse_recovery(str(recipe)) == recipe
        assert parse_recovery(recipe.short) == recipe
    assert str(Recipe(rank=8)).startswith("lora(rank=8, alpha=16, dropout=0, ")
    assert "steps" not in str(parse_recovery("joint"))
    assert shortened(str(parse_recovery("lora(rank=4, rate=0.002)"))) == "lora(rate=0.002)"
    assert Recipe(targets="gate+query") == Recipe(targets="query+gate")
    assert parse_recovery(" none ") is None


def test_published_settings_are_a_preset():
    recipe = parse_recovery("lora(preset=paper, length=2048)")
    assert (recipe.rank, recipe.alpha, recipe.dropout) == (16, 32, 0.1)
    assert (recipe.rate, recipe.warm_up, recipe.steps) == (2e-4, 0.1, 10_000)
    assert recipe.length == 2048
    assert set(PRESETS["paper"]) <= set(Recipe.__dataclass_fields__)


def test_lists_of_recoveries_are_canonical_and_without_repeats():
    assert parse_recoveries(["none,lora", "lora(rank=4)", "joint"]) == (
        NONE,
        str(Recipe()),
        str(Recipe(kind="joint")),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lorra", "unknown recovery 'lorra'; did you mean lora"),
        ("none(a=1)", "takes no parameters"),
        ("lora(ranc=3)", "no parameter 'ranc'; did you mean rank"),
        ("lora(rank=many)", "must be an integer"),
        ("lora(rank=0)", "rank must be at least 1"),
        ("lora(rate=-1)", "rate must be positive"),
        ("lora(dropout=1.0)", "dropout must be at least 0"),
        ("lora(targets=query+gatte)", "did you mean gate"),
        ("lora(preset=papper)", "it has paper"),
        ("lora(kind=joint)", "no parameter 'kind'"),
        ("joint(steps=3)", "recovery 'joint' has no parameter 'steps'"),
        ("lora(rank=1", "can't be read"),
        ("lora(rank)", "write parameter=value"),
    ],
)
def test_wrong_recipes_get_a_sentence(text, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")) as fault:
        parse_recovery(text)
    assert "\n" not in str(fault.value)


# --- training -----------------------------------------------------------------------------------


def test_loss_falls_under_recovery_and_the_model_is_left_alone(tiny_corpus, tmp_path):
    model = make_tiny()
    before = snapshot(model)
    recipe = Recipe(steps=25, batch=4, length=32, rate=1e-2)
    found = recover(THIN, model, tiny_corpus, recipe, progress=False)
    assert_same(before, model)
    assert len(found.curve) == 25
    assert found.tokens == 25 * 4 * 32
    assert found.curve[-1]["loss"] < found.curve[0]["loss"] - 0.5
    shares = {row["executed"] for row in found.curve}
    assert len(shares) == 1
    assert 0.5 < shares.pop() < 0.9
    tmp_path.joinpath("a").mkdir()
    facts = {"method": "m", "corpus": "c", "tokens": 1, "seed": 0, "model": fingerprint(model)}
    write_adapter(tmp_path / "a", found.factors, recipe, facts)
    held_out = tiny_corpus.windows(32, 4, 0, split="calibration").to(DEVICE)
    with torch.no_grad(), attach(model, THIN):
        thin = loss(model, held_out).item()
        with adapted(model, load_adapter(tmp_path / "a", model)):
            assert loss(model, held_out).item() < thin - 0.5
    assert_same(before, model)


@pytest.mark.parametrize("where", ["peft", "objective"])
def test_model_is_restored_after_an_exception(tiny_corpus, monkeypatch, where):
    model = make_tiny()
    before = snapshot(model)

    def fail(*_, **__):
        raise RuntimeError("struck")

    if where == "peft":
        monkeypatch.setattr("peft.tuners.lora.LoraLayer.update_layer", fail)
    else:
        monkeypatch.setattr(training, "window_loss", fail)
    with pytest.raises(RuntimeError, match="struck"):
        recover(THIN, model, tiny_corpus, QUICK, progress=False)
    assert_same(before, model)


def gradients(model, method, ids, backend="sparse", run=None):
    """Gradient of the window loss into every factor of a given adapter, by name."""
    with injected(model, QUICK) as layers:
        generator = torch.Generator().manual_seed(2)
        for layer in layers.values():
            second = layer.lora_B[training._NAME].weight
            second.data.copy_(0.1 * torch.randn(second.shape, generator=generator))
        if run is not None:
            nats = run(model)
        else:
            with attach(model, method, backend=backend) as trace:
                nats = window_loss(model, method, trace, ids)[0]
        nats.backward()
        return nats.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


GATED = [
    THIN,
    GivenPlan(plan=THIN.plan, phases="generation"),
    RandomMask(rate=0.6),
    RandomMask(rate=0.6, phases="generation"),
    RandomMask(rate=0.5, sublayers=(1,)),
]


@pytest.mark.parametrize("method", GATED, ids=repr)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_sparse_gradients_equal_masked(tiny_corpus, method, attn):
    model, ids = make_tiny(attn=attn), tiny_corpus.windows(20, 3, 0).to(DEVICE)
    sparse, masked = (gradients(model, method, ids, backend) for backend in ("sparse", "masked"))
    assert sparse[0] == pytest.approx(masked[0], rel=1e-6)
    assert len(sparse[1]) == 4 * 3 * 2
    for name, gradient in masked[1].items():
        # A sublayer that never ran has no graph in one, and zeros in the other.
        found = sparse[1][name]
        found = torch.zeros_like(gradient) if found is None else found
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert sum(float(gradient.abs().sum()) > 0 for gradient in masked[1].values()) > 12


def test_generation_objective_is_the_two_pass_scheme(tiny_corpus):
    """Pass 1: the prompt by the stock model; pass 2: the response by a model of the kept blocks
    alone, over the keys and values of pass 1. No runtime is involved."""
    from transformers import DynamicCache

    model, ids = make_tiny(), tiny_corpus.windows(20, 3, 0).to(DEVICE)
    method = load_method("uls", target_speedup=2.0, phases="generation")

    def two_passes(model):
        past = DynamicCache(config=model.config)
        prompt = model(ids[:, :10], past_key_values=past, use_cache=True).logits
        layers = model.model.layers
        model.model.layers = torch.nn.ModuleList(layers[i] for i in method.kept_blocks(4))
        response = model(ids[:, 10:], past_key_values=past, use_cache=True).logits
        model.model.layers = layers
        return next_token_loss(torch.cat([prompt, response], dim=1), ids)

    once, twice = gradients(model, method, ids), gradients(model, method, ids, run=two_passes)
    assert once[0] == pytest.approx(twice[0], rel=1e-6)
    for name, gradient in twice[1].items():
        torch.testing.assert_close(once[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    dense = gradients(model, load_method("dense"), ids)
    assert abs(dense[0] - once[0]) > 0.01


def test_window_loss_is_the_whole_loss(tiny_corpus):
    model, ids = make_tiny(), tiny_corpus.windows(16, 3, 0).to(DEVICE)
    with attach(model, THIN) as trace:
        nats, row = window_loss(model, THIN, trace, ids)
        assert nats.item() == pytest.approx(loss(model, ids).item(), rel=1e-6)
    assert row["loss"] == nats.item()


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "no"), ("float32", "bf16")])
def test_half_precision_trains_adapters_in_full(tiny_corpus, dtype, precision):
    model = make_tiny().to(getattr(torch, dtype))
    before = snapshot(model)
    recipe = Recipe(steps=20, batch=4, length=32, rate=1e-2, precision=precision)
    found = recover(THIN, model, tiny_corpus, recipe, progress=False)
    assert found.curve[-1]["loss"] < found.curve[0]["loss"] - 0.3
    assert {factor.dtype for pair in found.factors.values() for factor in pair} == {torch.float32}
    assert_same(before, model)


def test_windows_are_documents_of_their_own(tiny_corpus):
    model, ids = make_tiny(), tiny_corpus.windows(16, 8, 0).to(DEVICE)
    method = load_method("random_skip", target_speedup=2.0, phases="both")
    with attach(model, method) as trace:
        window_loss(model, method, trace, ids)
        assert len(set(trace.documents)) == 8
        window_loss(model, method, trace, ids[:2])
        assert len(trace.documents) == 2


# --- every method -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("phases", ["both", "generation"])
def test_every_method_is_recovered(tiny_corpus, name, phases):
    cls, model = method_class(name), make_tiny()
    speedup = min(1.5, cls().max_speedup(4))
    choosable = "phases" in cls.__dataclass_fields__
    given = {"phases": phases} if choosable else {}

    def build():
        return load_method(name, target_speedup=speedup, **given, **cls.quick)

    before = snapshot(model)
    if cls.speculates:  # adapters would be trained for another model than verifies
        with pytest.raises(UserError, match="as it is verifies"):
            recover_cached(build(), model, tiny_corpus, QUICK, progress=False)
        return
    method, adapter = recover_cached(build(), model, tiny_corpus, QUICK, progress=False)
    assert_same(before, model)
    assert adapter.card["tokens"] == 3 * 2 * 24
    with (adapter.folder / CURVE).open() as stream:
        assert len(list(csv.DictReader(stream))) == 3
    ids = tiny_corpus.windows(24, 2, 0).to(DEVICE)
    logits = []
    again, same = recover_cached(build(), model, tiny_corpus, QUICK, progress=False)
    assert same.folder == adapter.folder
    assert (again.facts, set(again.tensors)) == (method.facts, set(method.tensors))
    for found in (method, again):
        with torch.no_grad(), adapted(model, adapter), attach(model, found, documents=["a", "b"]):
            logits.append(model(ids).logits)
    assert torch.equal(*logits)
    assert_same(before, model)


def test_dense_recovered_learns_and_stays_dense(tiny_corpus):
    model, recipe = make_tiny(), Recipe(steps=20, batch=4, length=32, rate=1e-2)
    method, adapter = recover_cached(
        load_method("dense"), model, tiny_corpus, recipe, progress=False
    )
    ids = tiny_corpus.windows(32, 4, 0, split="calibration").to(DEVICE)
    with torch.no_grad(), attach(model, method) as trace:
        with adapted(model, adapter):
            recovered = loss(model, ids).item()
        totals = trace.totals()
        assert recovered < loss(model, ids).item()
    assert totals["block_flops"] == totals["dense_block_flops"]


def test_thresholds_are_solved_again_under_the_adapted_weights(tiny_corpus):
    model = make_tiny()
    given = {"target_speedup": 1.5, "phases": "both", "first_exit": 1, "every": 1}
    recipe = Recipe(steps=5, batch=4, length=32, rate=3e-2)
    fitted = load_method("early_exit", **given).fit(model, tiny_corpus)
    method, adapter = recover_cached(
        load_method("early_exit", **given), model, tiny_corpus, recipe, progress=False
    )
    assert method.facts["threshold"] != fitted.facts["threshold"]
    with adapted(model, adapter):
        fresh = load_method("early_exit", **given).fit(model, tiny_corpus)
    assert fresh.facts == method.facts
    assert load_method("early_exit", **given).fit(model, tiny_corpus).facts == fitted.facts


def test_joint_trains_adapters_while_the_method_is_fitted(tiny_corpus):
    model, seen = make_tiny(), []
    before = snapshot(model)

    class Trains(GivenPlan):
        needs_training = True

        def fit(self, model, corpus=None):
            seen.extend(name for name, p in model.named_parameters() if p.requires_grad)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.fill_(0.5)
            self.facts = {"tokens": 7}
            return self

    recipe = Recipe(kind="joint")
    found = recover(Trains(plan=THIN.plan), model, tiny_corpus, recipe, progress=False)
    assert len(seen) == 4 * 3 * 2
    assert all("lora_" in name for name in seen)
    assert found.tokens == 7
    assert all(bool((pair[1] == 0.5).all()) for pair in found.factors.values())
    assert_same(before, model)
    with pytest.raises(UserError, match="given_plan trains nothing; use lora"):
        recover(THIN, model, tiny_corpus, recipe)


@pytest.mark.parametrize("name", [n for n in methods() if method_class(n).needs_training])
def test_trained_methods_are_fitted_jointly(tiny_corpus, name):
    cls, model = method_class(name), make_tiny()
    before = snapshot(model)
    recipe = Recipe(kind="joint", rank=2)
    target = min(1.5, cls().max_speedup(4))
    method = load_method(name, target_speedup=target, **cls.quick)
    method, adapter = recover_cached(method, model, tiny_corpus, recipe, progress=False)
    assert_same(before, model)
    assert adapter.card["tokens"] == (method.curve[-1]["tokens"] if method.curve else 0)
    moved = [bool((second != 0).any()) for _, second in adapter.factors.values()]
    # A sublayer that no token ran in training has adapters that never moved.
    assert sum(moved) > len(moved) / 2
    # Most of the text is generation, for methods that keep prompts at full depth.
    attached = attach(model, method, prompt_length=4)
    with torch.no_grad(), adapted(model, adapter), attached as trace:
        model(tiny_corpus.windows(24, 2, 0).to(DEVICE))
        assert trace.totals()["block_flops"] < trace.totals()["dense_block_flops"]


# --- the cache ----------------------------------------------------------------------------------


def test_killed_training_goes_on_with_the_same_curve(tiny_corpus, monkeypatch, cache):
    model = make_tiny()
    recipe = Recipe(steps=6, batch=2, length=24, accumulate=2, dropout=0.2, rate=1e-2)
    method = load_method("uls", target_speedup=2.0)
    calm = recover(method, model, tiny_corpus, recipe, method.seed, progress=False)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    whole, calls = training.window_loss, []

    def struck(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(training, "window_loss", struck)
    with pytest.raises(KeyboardInterrupt):
        recover_cached(method, model, tiny_corpus, recipe, progress=False)
    _, adapter = recover_cached(method, model, tiny_corpus, recipe, progress=False)
    assert len(calls) == 8 + 6
    with (adapter.folder / CURVE).open() as stream:
        rows = [
            {k: float(v) for k, v in row.items() if k != "step"} for row in csv.DictReader(stream)
        ]
    assert rows == calm.curve
    for name, pair in calm.factors.items():
        for mine, theirs in zip(adapter.factors[name], pair, strict=True):
            assert torch.equal(mine, theirs.bfloat16())
    assert not list(cache.rglob("*.checkpoint"))


def test_key_follows_what_decides(tiny_corpus):
    model, method = make_tiny(), load_method("uls", target_speedup=2.0)
    keys = {
        recovery_key(method, model, tiny_corpus, QUICK, 0),
        recovery_key(method, model, tiny_corpus, QUICK, 1),
        recovery_key(method, model, tiny_corpus, Recipe(), 0),
        recovery_key(load_method("uls", target_speedup=1.5), model, tiny_corpus, QUICK, 0),
        recovery_key(method, make_tiny(seed=1), tiny_corpus, QUICK, 0),
    }
    assert len(keys) == 5


def test_damaged_cache_is_made_again(tiny_corpus):
    model, method = make_tiny(), load_method("dense")
    _, adapter = recover_cached(method, model, tiny_corpus, QUICK, progress=False)
    content = (adapter.folder / WEIGHTS).read_bytes()
    (adapter.folder / WEIGHTS).write_bytes(content[:-2] + b"xx")
    recover_cached(method, model, tiny_corpus, QUICK, progress=False)
    assert (adapter.folder / WEIGHTS).read_bytes() == content


def test_shipped_adapters_are_taken_where_they_fit(tiny_corpus, tmp_path, monkeypatch):
    model, method = make_tiny(), load_method("uls", target_speedup=2.0)
    monkeypatch.setattr(type(method), "shipped_adapters", tmp_path / "shipped")
    _, adapter = recover_cached(method, model, tiny_corpus, QUICK, progress=False)
    place = ship(method, adapter, "2-seed0-lora")
    assert place.parent == tmp_path / "shipped" / fingerprint(model)
    assert find_shipped(method, model, tiny_corpus, QUICK, 0) == place
    _, found = recover_cached(method, model, tiny_corpus, QUICK, progress=False)
    assert found.folder == place
    assert find_shipped(method, model, tiny_corpus, QUICK, 1) is None
    assert find_shipped(method, model, tiny_corpus, Recipe(), 0) is None
    other = load_method("uls", target_speedup=1.5)
    assert find_shipped(other, model, tiny_corpus, QUICK, 0) is None
    assert find_shipped(method, make_tiny(seed=1), tiny_corpus, QUICK, 0) is None


# --- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merged_equals_peft(tmp_path, family):
    from peft import PeftModel

    model, ids = make_tiny(family), torch.arange(3, 51, device=DEVICE).view(3, 16)
    before, plain = snapshot(model), model(ids).logits
    adapter = random_adapter(tmp_path / "a", model)
    with adapted(model, adapter):
        merged = model(ids).logits
        assert fingerprint(model) != adapter.card["model"]
    assert_same(before, model)
    assert torch.equal(model(ids).logits, plain)
    wrapped = PeftModel.from_pretrained(make_tiny(family), str(tmp_path / "a")).eval()
    torch.testing.assert_close(wrapped(ids).logits, merged, atol=1e-4, rtol=1e-4)
    assert (merged - plain).abs().max() > 0.1


def test_an_adapter_from_before_digests_were_as_today_is_taken(tmp_path, monkeypatch):
    from dyndepth.cells import identity

    model = make_tiny()
    before = fingerprint(model)
    adapter = random_adapter(tmp_path / "a", model)
    card = tmp_path / "a" / "recovery.json"
    card.write_text(card.read_text().replace(before, "0123456789abcdef"))
    with pytest.raises(UserError, match="another model"):
        load_adapter(tmp_path / "a", model)
    monkeypatch.setitem(identity.FORMER, "0123456789abcdef", before)
    older = load_adapter(tmp_path / "a", model)
    with adapted(model, adapter):
        inside = fingerprint(model)
    with adapted(model, older):
        assert fingerprint(model) == inside != before


def test_half_precision_models_are_restored_bit_for_bit(tmp_path):
    model = make_tiny().bfloat16()
    before = snapshot(model)
    adapter = random_adapter(tmp_path / "a", model)

    def strike():
        with adapted(model, adapter):
            assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
            raise RuntimeError("struck")

    with pytest.raises(RuntimeError, match="struck"):
        strike()
    assert_same(before, model)


def _shrunk(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, folder / WEIGHTS)
    _resealed(folder)


def _resealed(folder):
    import hashlib

    card = json.loads((folder / CARD).read_text())
    card["sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / CARD).write_text(json.dumps(card))


def _pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def _disguised(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps({"a": 1}))
    _resealed(folder)


def _reconfigured(folder):
    config = json.loads((folder / CONFIG).read_text()) | {"use_rslora": True}
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes(b"junk"), "not have the content"),
        (lambda folder: (folder / CARD).write_text("{"), "can't be read"),
        (lambda folder: (folder / CARD).write_text('{"layout": 1}'), "no entry 'model'"),
        (lambda folder: (folder / CARD).write_text('{"layout": 0}'), "its layout is 0"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "can't be read"),
        (lambda folder: (folder / CONFIG).unlink(), "can't be read"),
        (_shrunk, "factor A of model.layers.0"),
        (_pickled, "a pickle"),
        (_disguised, "can't be read"),
        (_reconfigured, "use_rslora"),
    ],
)
def test_damaged_adapters_are_refused_in_a_sentence(tmp_path, damage, says):
    model = make_tiny()
    random_adapter(tmp_path / "a", model)
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=says) as fault:
        load_adapter(tmp_path / "a", model)
    assert "\n" not in str(fault.value)


def test_adapters_of_another_model_and_second_adapters_are_refused(tmp_path):
    model, other = make_tiny(), make_tiny(seed=1)
    adapter = random_adapter(tmp_path / "a", model)
    with pytest.raises(UserError, match="made for another model"):
        load_adapter(tmp_path / "a", other)
    with pytest.raises(UserError, match="made for another model"), adapted(other, adapter):
        pass
    with adapted(model, adapter):
        with pytest.raises(UserError, match="adapted already"), adapted(model, adapter):
            pass
        assert hasattr(model, "dyndepth_adapter")
    assert not hasattr(model, "dyndepth_adapter")


def test_projections_that_are_no_plain_linear_maps_are_refused(tmp_path, tiny_corpus):
    class Quantised(torch.nn.Linear):
        pass

    model = make_tiny()
    adapter = random_adapter(tmp_path / "a", model)
    attention = model.model.layers[2].self_attn
    quantised = Quantised(attention.v_proj.in_features, attention.v_proj.out_features, bias=False)
    quantised.weight = attention.v_proj.weight
    attention.v_proj = quantised
    before = snapshot(model)
    says = "layers.2.self_attn.v_proj is no plain linear map"
    with pytest.raises(UserError, match=says), adapted(model, adapter):
        pass
    with pytest.raises(UserError, match=says):
        recover(THIN, model, tiny_corpus, QUICK, progress=False)
    assert_same(before, model)


def peft_model(model, folder):
    """``model`` with the adapter in ``folder`` as peft itself reads and merges it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_recovered_and_merged_as_peft_does(family, tiny_corpus):
    """All roles, so that fused maps and those that are kept transposed are among them."""
    model, reference = make_tiny(family), make_tiny(family)
    before = snapshot(model)
    targets = "query+key+value+output+gate"
    recipe = Recipe(rank=2, steps=2, batch=2, length=16, rate=0.1, targets=targets)
    _, adapter = recover_cached(load_method("dense"), model, tiny_corpus, recipe, progress=False)
    assert all(bool(second.any()) for _, second in adapter.factors.values())
    assert_same(before, model)
    ids = tiny_corpus.windows(16, 2, 0)
    with torch.no_grad():
        with adapted(model, adapter):
            merged = model(ids).logits
        assert not torch.allclose(merged, model(ids).logits, atol=1e-2)
        wanted = peft_model(reference, adapter.folder)(ids).logits
    torch.testing.assert_close(merged, wanted, atol=1e-4, rtol=1e-4)
    assert_same(before, model)


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, "layer_controller") for family in FAMILIES] + [("gpt2", "skipgpt")],
)
def test_every_family_is_recovered_together_with_routers(family, name, tiny_corpus):
    model = make_tiny(family)
    before = snapshot(model)
    quick = method_class(name).quick | {"steps": 2, "batch": 1, "length": 16}
    method = load_method(name, target_speedup=1.3, **quick)
    recipe = Recipe(kind="joint", rank=2)
    _, adapter = recover_cached(method, model, tiny_corpus, recipe, progress=False)
    assert any(bool(second.any()) for _, second in adapter.factors.values())
    assert_same(before, model)


def test_what_an_adapter_cannot_sit_on_is_told_with_its_cause():
    def told(change):
        model = make_tiny("gpt2")
        block = model.transformer.h[1].attn
        change(block)
        with pytest.raises(UserError, match="h.1.attn.c_attn is") as fault:
            adaptable(model, Recipe())
        return str(fault.value)

    def integers(block):
        weight = block.c_attn.weight.to(torch.int8)
        block.c_attn.weight = torch.nn.Parameter(weight, requires_grad=False)

    def wrapped(block):
        with injected(make_tiny("gpt2"), QUICK) as layers:
            block.c_attn = next(iter(layers.values()))

    assert "it is quantised: Conv1D" in told(integers)
    assert "it carries an adapter already: Linear" in told(wrapped)
    assert "is offloaded" in told(lambda block: block.c_attn.to("meta"))
    assert len(adaptable(make_tiny("gpt2"), Recipe())) == 8


def test_recovery_needs_text():
    with pytest.raises(UserError, match="give a corpus"):
        recover(THIN, make_tiny(), None, QUICK)
