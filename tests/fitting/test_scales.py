"""Scales are what hooks on a stock model see, and what a skipped sublayer multiplies by."""

from __future__ import annotations

import copy

import pytest
import torch
from test_attach import ids
from test_updates import Times

import dyndepth
from dyndepth.cells.cell import parameters_text
from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method
from dyndepth.export.plain import kept_blocks
from dyndepth.fitting.fits import fit_cached, save_fit
from dyndepth.fitting.scales import lengthening
from dyndepth.methods.static_pruning import StaticPruning
from dyndepth.methods.uls import UnifiedLayerSkipping
from dyndepth.models.blocks import decoder
from dyndepth.runtime.attach import attach

NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_scales_are_what_hooks_see(tiny, family):
    """One of the models runs its sublayers in parallel: both lengthen the block's input."""
    model, text = tiny(family), ids(5, 16)
    seen = {}

    def keep(key):
        return lambda _, args, out: seen.setdefault(key, []).append((args[0], out))

    for index, layer in enumerate(decoder(model).layers):
        for sublayer, norm in enumerate(NORMS):
            getattr(layer, norm).register_forward_hook(keep((index, sublayer)))
        layer.register_forward_hook(keep((index, "out")))
    for row in text:
        model(row[None])
    for layer in decoder(model).layers:
        for module in (layer, *(getattr(layer, norm) for norm in NORMS)):
            module._forward_hooks.clear()
    found = lengthening(model, text, progress=False)
    for index, layer in enumerate(decoder(model).layers):
        for sublayer in (0, 1):
            token, tensor = [], []
            for window in range(5):
                x, normed = seen[index, sublayer][window]
                if family == "gpt_neox":
                    attended = (
                        seen[index, "out"][window][1][0] - x - layer.mlp(seen[index, 1][window][1])
                    )
                    after = x + (layer.mlp(normed) if sublayer else attended)
                else:
                    end = seen[index, "out"][window][1]
                    end = end[0] if isinstance(end, tuple) else end
                    after = end if sublayer else seen[index, 1][window][0]
                token.append((after.norm(dim=-1) / x.norm(dim=-1)).mean())
                tensor.append(after.norm() / x.norm())
            mean = [torch.stack(each).mean().item() for each in (token, tensor)]
            assert found.token[index][sublayer] == pytest.approx(mean[0], rel=1e-5)
            assert found.tensor[index][sublayer] == pytest.approx(mean[1], rel=1e-5)
    assert found.token != found.tensor
    assert lengthening(model, text) == found  # kept


def replaced(model, scales):
    """A stock model in which what is scaled is a multiple of what it reads."""
    stock = copy.deepcopy(model)
    for layer, row in zip(decoder(stock).layers, scales, strict=True):
        for sublayer, (norm, name) in enumerate(zip(NORMS, ("self_attn", "mlp"), strict=True)):
            if row[sublayer] is not None:
                setattr(layer, norm, torch.nn.Identity())
                setattr(layer, name, Times(row[sublayer] - 1, attention=sublayer == 0))
    return stock


@pytest.mark.parametrize(
    "spec",
    [
        "static_pruning(scale=token, windows=4, length=16)",
        "static_pruning(criterion=joint, scale=tensor, windows=4, length=16)",
        "uls(spacing=even, scale=token, windows=4, length=16)",
        "adaskip(windows=4, length=16)",
    ],
)
def test_a_scaled_plan_is_a_stock_model_with_other_modules(tiny, tiny_corpus, tmp_path, spec):
    model = tiny()
    method = fit_cached(load_method(spec, target_speedup=1.5), model, tiny_corpus)
    scales = method.facts["scales"]
    plan = method.start(type("Context", (), {"layers": 4}))
    assert [[each is None for each in row] for row in scales] == plan.tolist()
    assert not plan.all()
    with attach(model, method):
        found = model(ids(2, 9)).logits
    want = replaced(model, scales)(ids(2, 9), use_cache=False).logits
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    save_fit(method, model, tmp_path / "saved")
    for other in (
        fit_cached(load_method(spec, target_speedup=1.5), model, tiny_corpus),
        dyndepth.load_method(tmp_path / "saved"),
    ):
        with attach(model, other):
            assert torch.equal(model(ids(2, 9)).logits, found)
    kept, reason = kept_blocks(method, plan.double())
    assert (kept, "puts something in the place" in reason) == ([], True)


def test_scales_follow_weights_that_moved_and_the_plan_stays(tiny, tiny_corpus):
    model, other = tiny(), tiny(seed=1)
    for method in (
        StaticPruning(target_speedup=1.5, scale="token", **StaticPruning.quick),
        UnifiedLayerSkipping(target_speedup=1.5, scale="token", **StaticPruning.quick),
    ):
        method.fit(model, tiny_corpus)
        before, plan = method.facts["scales"], method.tensors.get("plan")
        method.calibrate(other, tiny_corpus)
        after = method.facts["scales"]
        assert after != before
        assert [[each is None for each in row] for row in after] == [
            [each is None for each in row] for row in before
        ]
        assert method.tensors.get("plan") is plan


def test_without_a_scale_nothing_is_asked_or_read(tiny, tiny_corpus):
    model = tiny()
    uls = UnifiedLayerSkipping(target_speedup=1.5)
    assert uls.fitted
    assert not uls.substitutes
    assert uls.fit(model).facts == {}
    assert "scale" not in parameters_text(uls)
    pruned = StaticPruning(target_speedup=1.5, **StaticPruning.quick).fit(model, tiny_corpus)
    assert not pruned.substitutes
    assert "scales" not in pruned.facts
    assert load_method("uls(scale=none)") == UnifiedLayerSkipping()
    dense = UnifiedLayerSkipping(scale="token")
    assert dense.fitted
    assert not dense.substitutes


def test_scales_need_text(tiny):
    scaled = UnifiedLayerSkipping(target_speedup=1.5, scale="token")
    assert not scaled.fitted
    with pytest.raises(UserError, match="uls measures its scales on text; give fit a corpus"):
        scaled.fit(tiny())
    with pytest.raises(UserError, match="not fitted"), attach(tiny(), scaled):
        pass
    with pytest.raises(ValueError, match="windows is of the text that scales are measured on"):
        UnifiedLayerSkipping(target_speedup=1.5, windows=4)


@pytest.mark.parametrize("layers", [3, 6])
def test_scales_of_another_depth_are_refused(tiny, tiny_corpus, layers):
    spec = "uls(spacing=even, scale=token, windows=2, length=32)"
    scaled = load_method(spec, target_speedup=1.5).fit(tiny(), tiny_corpus)
    other = tiny(num_hidden_layers=layers)
    message = f"scales are for a model of 4 blocks, not {layers}"
    with attach(other, scaled, warn=False), pytest.raises(UserError, match=message):
        other(ids(1, 4))
