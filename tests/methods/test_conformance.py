"""What every registered method must hold, on every supported family.

A new method inherits all of this by its entry-point line alone. Methods are fitted on tiny models
with the parameters that they declare as ``quick``.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, TOLERANCE, variants
from recording import StandIn
from test_attach import ids, incremental, padded
from test_flops import counted

import dyndepth
from dyndepth.common.registry import load_method, method_class, methods
from dyndepth.fitting.fits import load_fit, save_fit
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.blocks import Decoder
from dyndepth.models.families import FAMILIES
from dyndepth.models.shapes import shapes
from dyndepth.runtime.attach import attach
from dyndepth.runtime.flops import BlockCosts
from dyndepth.runtime.graphs import Graphs, obstacle
from dyndepth.runtime.recorded_updates import unrecordable

TARGET = 1.5
ATTENTION = ("sdpa", "eager")
DOCUMENTS = ["a", "b", "c"]
ROOT = Path(__file__).parents[2]

conforming = pytest.mark.parametrize(
    ("name", "phases"),
    [
        (name, phases)
        for name in methods()
        for phases in (
            ("generation", "both")
            if "phases" in {f.name for f in fields(method_class(name))}
            else (None,)
        )
    ],
)
families = pytest.mark.parametrize("family", FAMILIES)
every_variant = variants()
implementations = pytest.mark.parametrize("attn", ATTENTION)


@pytest.fixture(scope="session")
def model_of(tiny):
    """The model of a family, made once: whatever is attached leaves it as it was, which is tested
    with the runtime, and looked at here."""

    @functools.cache
    def made(family: str, attn: str):
        model = tiny(family, attn)
        return model, [type(module) for module in model.modules()]

    def find(family: str, attn: str = "sdpa"):
        model, classes = made(family, attn)
        assert [type(module) for module in model.modules()] == classes, "a method is still attached"
        return model

    return find


@pytest.fixture(scope="session")
def fitted(tiny, tiny_corpus):
    """A method fitted to a tiny model; each combination once."""

    @functools.cache
    def fit(name: str, phases: str | None, family: str, target: float = TARGET):
        target = min(target, method_class(name)().max_speedup(4))
        given = {"phases": phases} if phases else {}
        method = load_method(name, target_speedup=target, **given, **method_class(name).quick)
        return method.fit(tiny(family, "sdpa"), tiny_corpus)

    return fit


@conforming
@families
def test_target_one_is_dense(model_of, fitted, name, phases, family):
    model = model_of(family, "sdpa")
    with attach(model, fitted(name, phases, family, target=1.0), documents=DOCUMENTS):
        attached = model(ids(3, 10)).logits
    assert torch.equal(attached, model(ids(3, 10)).logits)


@conforming
@every_variant
def test_sparse_equals_masked(model_of, fitted, name, phases, family, attn):
    model, method = model_of(family, attn), fitted(name, phases, family)
    logits = []
    for backend in ("sparse", "masked"):
        with attach(model, method, documents=DOCUMENTS, prompt_length=3, backend=backend):
            logits.append(model(ids(3, 12)).logits)
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)


@conforming
@every_variant
def test_cached_decode_equals_one_forward(model_of, fitted, name, phases, family, attn):
    model, method = model_of(family, attn), fitted(name, phases, family)
    tokens = ids(3, 12)
    with attach(model, method, documents=DOCUMENTS) as trace:
        steps = incremental(model, tokens, prompt=5)
        trace.prompt_length = 5
        whole = model(tokens).logits
    torch.testing.assert_close(steps, whole, atol=TOLERANCE, rtol=0)


@conforming
@every_variant
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single(model_of, fitted, name, phases, family, attn, side):
    model, method = model_of(family, attn), fitted(name, phases, family)
    tokens, mask, positions = padded(side)
    prompts = torch.tensor([5, 4, 2])
    with attach(model, method, documents=DOCUMENTS, prompt_length=prompts) as trace:
        batch = model(tokens, attention_mask=mask, position_ids=positions).logits
        together = trace.by_document()
        trace.reset()
        for row, document in enumerate(DOCUMENTS):
            real = mask[row].bool()
            trace.documents, trace.prompt_length = [document], int(prompts[row])
            alone = model(tokens[row : row + 1, real]).logits[0]
            torch.testing.assert_close(batch[row, real], alone, atol=TOLERANCE, rtol=0)
        assert trace.by_document() == together


@conforming
@families
def test_generations_in_a_row_equal_a_fresh_one(model_of, fitted, name, phases, family):
    method = fitted(name, phases, family)
    tokens, mask, _ = padded("left")

    def generate(model):
        return model.generate(
            tokens, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False
        )

    model = model_of(family, "sdpa")
    with attach(model, method, documents=DOCUMENTS):
        generate(model)
        model(ids(3, 6, seed=5))
        second = generate(model)
    with attach(model, method, documents=DOCUMENTS):
        assert torch.equal(generate(model), second)


@conforming
@pytest.mark.parametrize("batch", [1, 3])
@families
def test_steps_by_graphs_equal_eager_steps(model_of, fitted, name, phases, family, batch):
    """Whatever a method says of ``capturable``: recorded, its gates are those of eager mode."""
    model, method, tokens = model_of(family), fitted(name, phases, family), ids(batch, 12)
    unrecorded = method.foresees or method.kv_policy == "evict" or unrecordable(method)
    if obstacle(Decoder.of(model)) is not None or unrecorded:
        pytest.skip("not recorded")
    documents = DOCUMENTS[:batch]
    with torch.inference_mode():
        with attach(model, method, documents=documents) as eager:
            want = incremental(model, tokens, prompt=5)
        with (
            Graphs(StandIn() if DEVICE.type == "cpu" else None) as graphs,
            attach(model, method, documents=documents, mode=graphs) as trace,
        ):
            found = incremental(model, tokens, prompt=5)
            assert (graphs.steps, graphs.others) == (7, 0)
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
    assert trace.totals()["total_flops"] == eager.totals()["total_flops"]
    assert trace.by_document() == eager.by_document()


@conforming
@families
def test_skipping_is_real_and_billed(model_of, fitted, name, phases, family):
    """The counter sees exactly the ledger's FLOPs, and fewer in the blocks than dense's; none fewer
    where a method speculates, for this is no draft."""
    model, method = model_of(family, "eager"), fitted(name, phases, family)
    with attach(model, method, documents=["a"], prompt_length=3) as trace:
        assert counted(lambda: model(ids(1, 24))) == sum(trace.flops.values())
        totals = trace.totals("generation")
    if method.speculates:
        assert totals["block_flops"] == totals["dense_block_flops"]
    elif method.target_speedup > 1:
        assert totals["block_flops"] < totals["dense_block_flops"]
    if phases == "generation":
        prompt, unseen = trace.totals("prompt"), 0.0
        if method.kv_policy == "evict":
            # Its three tokens pay for all keys of the forward, and some blocks have fewer.
            score, runs = BlockCosts.of(model).score, trace.executed()[:, 0].numpy()
            unseen = 3 * (score * 24 * (1 - runs)).sum()
        assert prompt["block_flops"] == pytest.approx(prompt["dense_block_flops"] - unseen)
        assert (trace.executed("prompt") == 1).all()


@conforming
def test_deterministic_and_saved_exactly(tiny, fitted, tiny_corpus, name, phases, tmp_path):
    model, method = tiny("llama", "sdpa"), fitted(name, phases, "llama")
    save_fit(method, model, tmp_path / "fit")
    given = {f.name: getattr(method, f.name) for f in fields(method)}
    fresh = load_fit(load_method(name, **given), model, tmp_path / "fit")
    loaded = dyndepth.load_method(tmp_path / "fit")
    refitted = load_method(name, **given).fit(model, tiny_corpus)
    assert repr(fresh) == repr(method) == repr(refitted) == repr(loaded)
    logits = []
    for candidate in (method, fresh, refitted, loaded, method):
        with attach(model, candidate, documents=DOCUMENTS, prompt_length=3):
            logits.append(model(ids(3, 12)).logits)
    assert all(torch.equal(one, logits[0]) for one in logits)
    assert json.loads(json.dumps(method.facts)) == method.facts


@pytest.mark.parametrize("name", methods())
def test_declares_what_the_contract_asks(name):
    cls = method_class(name)
    assert issubclass(cls, DynamicDepthMethod)
    assert cls.name == name
    assert cls.granularity in ("static", "sequence", "token")
    method = cls()
    assert method.phases in ("generation", "both")
    assert method.kv_policy in ("drop", "project", "prompt_only", "evict")
    assert cls.paper
    assert (cls.__doc__ or "").strip()
    assert cls().max_speedup(30) >= 1.0
    assert all(f.kw_only for f in fields(cls))
    tries = cls.candidates is not DynamicDepthMethod.candidates
    assert cls.uses_labels or not (tries or cls.foresees)


def test_harness_names_no_method_and_no_family():
    """dyndepth/ knows methods through the registry, and families through families.py alone."""
    names = "|".join(sorted(set(methods()) - {"dense"}) + ["unified.layer.skipping"])
    known = [f"shape:{name}" for name, shape in shapes().items() if "/" in shape["source"]]
    families_named = "|".join(map(re.escape, sorted([*FAMILIES, *known], key=len, reverse=True)))
    for path in sorted((ROOT / "dyndepth").rglob("*")):
        if path.suffix not in (".py", ".yaml") or "__pycache__" in path.parts:
            continue
        text = path.read_text(encoding="utf-8").lower()
        assert not re.search(rf"\b({names})\b", text), f"{path} names a method"
        if path.name != "families.py":
            assert not re.search(rf"\b({families_named})\b", text), f"{path} names a family"
