"""Fits, gates and scores beside a model that lies on another device than the CPU, or on two.

The device is a stand-in (``standin``): it computes what the CPU does, bit for bit, and refuses
tensors of two devices as a GPU does.
"""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny
from test_runtime import incremental

from dyndepth.blocks import family
from dyndepth.registry import load_method, method_class, methods
from dyndepth.runtime import attach

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch knows no devices that are written in Python",
)

VARIANTS = [
    *methods(),
    "skipgpt(standardise=true, initial=order)",
    "skipgpt(initial=damage, estimator=gumbel, objective=ce, phases=generation)",
    "skipgpt(preset=paper, ramp=0.5, curriculum=false, penalty=8.0, threshold=solved)",
    "skipgpt(router=mlp, initial=order, normalise=false)",
    "skipgpt(reads=constant)",
    "layer_controller(initial=random, estimator=gumbel, objective=ce, cost=linear)",
    "layer_controller(reads=constant, phases=both)",
    "early_exit(confidence=saturation, phases=both)",
    "early_exit(confidence=max_prob)",
    "early_exit(confidence=fixed)",
    "random_mask(rates=uniform)",
    "exit_oracle(agree=stays, phases=both)",
]
SPREAD = [spec for spec in VARIANTS if "damage" in spec or "mlp" in spec or "(" not in spec]
SPREAD.append("early_exit(confidence=saturation, phases=both)")
SHORTER = {"skipgpt": {"steps": 2, "windows": 4}, "layer_controller": {"steps": 2}}
DOCUMENTS = ["a", "b"]


@pytest.fixture(scope="module")
def device():
    import standin

    return torch.device(standin.NAME, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))


def tokens(batch, length):
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(1))


def spread(model, device):
    """The first half of the blocks on the CPU, the rest on ``device``, by accelerate's hooks."""
    from accelerate import dispatch_model

    record = family(model)
    layers = f"{record.decoder}.{record.layers}"
    places = {name: "cpu" for name, module in model.named_modules() if not list(module.children())}
    places = {name: place for name, place in places.items() if not name.startswith(layers)}
    places |= {f"{layers}.{index}": "cpu" if index < 2 else str(device) for index in range(4)}
    places |= {f"{record.decoder}.{record.final_norm}": str(device), "lm_head": str(device)}
    return dispatch_model(model, places, main_device="cpu", force_hooks=True)


def placed(kind, device):
    model = make_tiny("llama", "eager").cpu()
    return {
        "cpu": lambda m: m,
        "whole": lambda m: m.to(device),
        "spread": lambda m: spread(m, device),
    }[kind](model)


def fitted(spec, model, corpus):
    name = spec.partition("(")[0]
    quick = method_class(name).quick | SHORTER.get(name, {})
    given = {key: value for key, value in quick.items() if f"{key}=" not in spec}
    return load_method(spec, target_speedup=1.3, **given).fit(model, corpus)


def logits(model, method, device):
    """Of one forward, of a batch with padding, and of decoding over a cache; on the CPU."""
    ids = tokens(2, 9).to(device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad(), attach(model, method, documents=DOCUMENTS, prompt_length=4) as trace:
        found = [model(ids).logits, model(ids, attention_mask=mask).logits[:, 5:]]
        trace.prompt_length = None
        found.append(incremental(model, ids, prompt=7))
        return [each.cpu() for each in found], trace.totals(), trace.executed()


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("whole", spec) for spec in VARIANTS] + [("spread", spec) for spec in SPREAD],
)
def test_fits_and_gates(spec, kind, device, tiny_corpus):
    plain = placed("cpu", device)
    want_method = fitted(spec, plain, tiny_corpus)
    want, flops, executed = logits(plain, want_method, "cpu")
    model = placed(kind, device)
    method = fitted(spec, model, tiny_corpus)
    assert method.facts == want_method.facts
    found, counted, ran = logits(model, method, device if kind == "whole" else "cpu")
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert counted == flops
    assert torch.equal(ran, executed)
