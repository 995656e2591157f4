"""One pass at full depth against a run of each threshold: equal wherever that is promised."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from dyndepth.fitting.calibration import block_speedup
from dyndepth.methods.early_exit import EarlyExit, offline, threshold
from dyndepth.runtime.attach import attach

LAYERS = 8
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
CONFIDENCES = ["margin", "max_prob", "saturation"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def text(sequences, length, seed=1):
    """Token ids and the tokens after them: int64 ``[sequences, length]``, twice."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (sequences, length + 1), generator=generator).to(DEVICE)
    return ids[:, :-1], ids[:, 1:]


def between(table, count):
    """``count`` thresholds, each halfway between two confidences; at the ends all or none leave."""
    values = table.best.unique()
    places = torch.linspace(0, len(values) - 2, count - 2).long()
    return torch.cat((values[:1] - 1, (values[places] + values[places + 1]) / 2, values[-1:] + 1))


@torch.no_grad()
def run(model, method, limit, ids, targets, prompt_length=None):
    """Blocks run, log-probability of the target, whether it is likeliest, and the phase's totals:
    what the sparse runtime does at one threshold."""
    method.facts["threshold"] = limit.item()
    with attach(model, method, prompt_length=prompt_length) as trace:
        logits = model(ids).logits
        blocks = trace.gates()[..., 0].sum(-1)
        totals = trace.totals(None if prompt_length is None else "generation")
    log = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return blocks, log.cpu(), (logits.argmax(-1) == targets).cpu(), totals


def where(values, exits):
    """``values`` ``[exits + 1, ...]`` where each token leaves."""
    return values.gather(0, exits[None])[0]


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_until_the_first_token_has_left(tiny, family, confidence):
    model = tiny(family, num_hidden_layers=LAYERS)
    ids, targets = text(40, 6)
    method = EarlyExit(
        target_speedup=2, confidence=confidence, phases="both", first_exit=2, every=2
    )
    table = offline.table(method, model, ids, targets)
    places = set()
    for limit in between(table, 7):
        blocks, log, hit, _ = run(model, method, limit, ids, targets)
        exits, exact = table.exits(limit), table.exact(limit)
        assert exact[:, 0].all()
        assert torch.equal(table.depth[exits][exact], blocks[exact])
        assert (where(table.log_probability, exits) - log)[exact].abs().max() < 1e-5
        assert torch.equal(where(table.likeliest, exits)[exact], hit[exact])
        # Who leaves at the first candidate is known of all.
        assert torch.equal(exits == 0, blocks == table.depth[0])
        places |= set(exits[exact].tolist())
    assert places == set(range(len(table.depth)))
    assert table.exact(2.0).all()  # nobody leaves


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_over_first_generated_tokens_are_those_of_each_run(tiny, family, confidence):
    """One generated token after each prompt: all that it sees ran at full depth."""
    model = tiny(family, num_hidden_layers=LAYERS)
    ids, targets = text(60, 8)
    how = {"confidence": confidence, "phases": "generation"}
    method = EarlyExit(target_speedup=2, first_exit=2, every=2, **how)
    table = offline.table(method, model, ids, targets).since(7)
    limits = between(table, 7)
    speedups, executed = table.speedup(limits), table.executed(limits)
    log_likelihood = table.mean(table.log_probability, limits)
    accuracy = table.mean(table.likeliest, limits)
    assert speedups.tolist() == sorted(speedups.tolist(), reverse=True)
    for place, limit in enumerate(limits):
        blocks, log, hit, totals = run(model, method, limit, ids, targets, prompt_length=7)
        assert (blocks[:, :7] == LAYERS).all()
        assert executed[place] == pytest.approx(blocks[:, 7].double().mean().item())
        measured = totals["dense_block_flops"] / totals["block_flops"]
        assert speedups[place] == pytest.approx(measured, rel=1e-9)
        assert log_likelihood[place] == pytest.approx(log[:, 7].mean().item(), abs=1e-5)
        assert accuracy[place] == pytest.approx(hit[:, 7].double().mean().item())


@pytest.mark.parametrize("phases", ["generation", "both"])
def test_with_one_candidate_every_speedup_is_exact(tiny, phases):
    model, ids = tiny(num_hidden_layers=LAYERS), text(8, 64)[0]
    method = EarlyExit(target_speedup=2, phases=phases, first_exit=4, every=LAYERS)
    table = offline.table(method, model, ids).since(32 if phases == "generation" else 0)
    limits = between(table, 9)
    for limit, expected in zip(limits, table.speedup(limits), strict=True):
        method.facts["threshold"] = limit.item()
        assert block_speedup(model, method, ids) == pytest.approx(expected.item(), rel=1e-9)


def test_prefix_sums_are_sums(tiny):
    """Ties, and thresholds that are confidences: at a threshold a token leaves."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randint(0, 5, (3, 4, 7), generator=generator) / 4
    values = torch.randn(4, 4, 7, generator=generator)
    depth = torch.tensor([2, 4, 6, 8])
    table = offline.Table(depth, depth / 8.0, confidence)
    limits = torch.tensor([-1.0, 0.0, 0.25, 0.3, 0.5, 1.0, 2.0])
    means = table.mean(values, limits)
    for limit, mean in zip(limits, means, strict=True):
        kept = [
            next((e for e in range(3) if confidence[e, s, t] >= limit), 3)
            for s in range(4)
            for t in range(7)
        ]
        assert table.exits(limit).flatten().tolist() == kept
        assert mean == pytest.approx(where(values, table.exits(limit)).mean().item(), abs=1e-6)


def test_on_long_text_a_run_differs_and_the_fit_corrects(tiny, tiny_corpus):
    model = tiny(num_hidden_layers=LAYERS)
    windows = tiny_corpus.windows(256, 4, 0, split="calibration").to(DEVICE)
    off = []
    for target in (1.5, 2.0, 3.0):
        method = EarlyExit(target_speedup=target, confidence="saturation", phases="both")
        method.first_exit = method.every = 1
        table = offline.kept_table(method, model, windows)
        limits = table.best.unique()
        method.facts["threshold"] = limits[(table.speedup(limits) > target).sum()].item()
        off.append(abs(block_speedup(model, method, windows) / target - 1))
        method.fit(model, tiny_corpus)
        assert block_speedup(model, method, windows) == method.facts["achieved_speedup"]
        assert method.facts["achieved_speedup"] == pytest.approx(target, rel=0.01)
    assert max(off) > 0.03


def test_one_dense_pass_serves_all_targets_and_phases(tiny, tiny_corpus, cache, monkeypatch):
    model, passes, real = tiny(num_hidden_layers=LAYERS), [], offline._pass
    monkeypatch.setattr(offline, "_pass", lambda *given: passes.append(given) or real(*given))

    def fit(**settings):
        given = {"target_speedup": 1.5, "every": 1} | settings
        return EarlyExit(**given).fit(model, tiny_corpus).facts

    first = fit()
    for settings in ({"target_speedup": 1.25}, {"phases": "both"}, {"target_speedup": 2.0}):
        fit(**settings)
    (file,) = cache.glob("early_exit/*/confidence.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert len(passes) == 1
    assert fit() == first
    assert len(passes) == 2
    for count, other in enumerate(({"confidence": "max_prob"}, {"every": 2}, {"seed": 1}), start=3):
        fit(**other)
        assert len(passes) == count


def test_few_sparse_passes_correct(tiny, tiny_corpus, monkeypatch):
    model, asked, real = tiny(num_hidden_layers=LAYERS), [], threshold.block_speedup
    monkeypatch.setattr(threshold, "block_speedup", lambda *given: asked.append(1) or real(*given))
    for target in (1.1, 1.25, 1.5, 2.0):
        EarlyExit(target_speedup=target, phases="both", every=1).fit(model, tiny_corpus)
    assert len(asked) <= 8
