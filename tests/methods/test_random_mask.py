"""The rate-matched random mask: its draws, its rates, and how both meet the target."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from test_attach import ids

from dyndepth.cells.cell import parameters_text
from dyndepth.common.errors import UserError
from dyndepth.fitting.calibration import block_speedup, measured
from dyndepth.method import ForwardContext
from dyndepth.methods.random_mask import RandomMask, mixed, shifted
from dyndepth.runtime.attach import attach

LAYERS = 4


def fixed(rate: float | list[list[float]], **given) -> RandomMask:
    """A mask with rates that were not fitted."""
    method = RandomMask(target_speedup=1.5, **given)
    table = torch.tensor(rate, dtype=torch.float64)
    method.tensors = {"rates": table.expand(LAYERS, 2).clone() if table.ndim == 0 else table}
    return method


def draws(method: RandomMask, documents: list[str], tokens: int, past: int = 0) -> torch.Tensor:
    """Bool ``[batch, tokens, layers, 2]``, as the runtime would ask for it."""
    context = ForwardContext(
        layers=LAYERS,
        batch=len(documents),
        tokens=tokens,
        past_length=past,
        device=torch.device("cpu"),
        phase="prompt",
        valid=None,
        generation=None,
        documents=documents,
        head=lambda hidden: hidden,
        bill=lambda *_: None,
    )
    assert method.start(context) is None
    found = torch.empty(len(documents), tokens, LAYERS, 2, dtype=torch.bool)
    for layer in range(LAYERS):
        for sublayer, gate in enumerate(method.gates(layer, torch.empty(0))):
            found[:, :, layer, sublayer] = gate
    return found


@pytest.fixture(scope="module")
def matched(tiny, tiny_corpus):
    return RandomMask(target_speedup=1.4, **RandomMask.quick).fit(tiny(), tiny_corpus)


def test_mixed_is_a_bijection_of_32_bits_that_avalanches():
    values = torch.randint(2**32, (20_000,), generator=torch.Generator().manual_seed(0))
    out = mixed(values)
    assert out.min() >= 0
    assert out.max() < 2**32
    assert len(out.unique()) == len(values.unique())
    # Each input bit flips each output bit in about half of all cases.
    for bit in range(32):
        changed = out ^ mixed(values ^ (1 << bit))
        flips = torch.stack([(changed >> other) & 1 for other in range(32)]).double().mean(1)
        assert ((flips - 0.5).abs() < 0.05).all()


def test_mixed_equals_the_published_constants_in_python_integers():
    def lowbias32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    values = [0, 1, 2**31, 2**32 - 1, 123_456_789, 0xDEADBEEF]
    assert mixed(torch.tensor(values)).tolist() == [lowbias32(x) for x in values]


def test_each_sublayer_executes_at_its_rate():
    rates = [[0.0, 1.0], [0.1, 0.9], [0.5, 0.25], [0.75, 0.999]]
    seen = draws(fixed(rates), [str(n) for n in range(50)], 1000).double().mean((0, 1))
    # 50,000 draws: five standard deviations are 0.011.
    torch.testing.assert_close(seen, torch.tensor(rates).double(), atol=0.011, rtol=0)
    assert seen[0].tolist() == [0.0, 1.0]


def test_draws_depend_on_document_position_sublayer_and_seed_alone():
    first = draws(fixed(0.5), ["a", "b"], 400)
    assert torch.equal(first, draws(fixed(0.5), ["b", "c", "a"], 400)[[2, 0]])
    assert torch.equal(first[:, 300:], draws(fixed(0.5), ["a", "b"], 100, past=300))
    assert torch.equal(first[:, :7], draws(fixed(0.5), ["a", "b"], 7))
    other = draws(fixed(0.5, seed=1), ["a", "b"], 400)
    assert 0.45 < (first == other).double().mean() < 0.55
    assert 0.45 < (first[0] == first[1]).double().mean() < 0.55


def test_neighbours_are_uncorrelated():
    """Between tokens, blocks, sublayers, documents and seeds: below 0.02 over 80,000 pairs."""
    names = [f"document {n}" for n in range(20)]
    one = draws(fixed(0.5), names, 1000).double() - 0.5
    other_seed = draws(fixed(0.5, seed=1), names, 1000).double() - 0.5
    pairs = {
        "token": (one[:, 1:], one[:, :-1]),
        "second token": (one[:, 2:], one[:, :-2]),
        "block": (one[:, :, 1:], one[:, :, :-1]),
        "sublayer": (one[..., 0], one[..., 1]),
        "document": (one[1:], one[:-1]),
        "seed": (one, other_seed),
    }
    for what, (left, right) in pairs.items():
        assert abs(4 * (left * right).mean()) < 0.02, what


def test_a_lower_rate_executes_a_subset():
    few, many = draws(fixed(0.3), ["a"], 500), draws(fixed(0.6), ["a"], 500)
    assert (few <= many).all()


def test_fit_takes_the_rates_of_its_source(tiny, tiny_corpus, matched):
    model, windows = tiny(), tiny_corpus.windows(48, 8, 0, split="calibration").to(DEVICE)
    source = matched.source_method().fit(model, tiny_corpus)
    seen = measured(model, source, windows)
    rates = matched.tensors["rates"]
    # A source misses its target by up to half a percent; the few rates that can move make it up.
    torch.testing.assert_close(rates, seen.executed, atol=0.05, rtol=0)
    assert matched.facts["source"] == repr(source)
    assert ((rates > 0) & (rates < 1)).any()
    assert rates.std() > 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rates", ["matched", "uniform"])
@pytest.mark.parametrize("phases", ["both", "generation"])
def test_target_is_met(tiny, tiny_corpus, seed, rates, phases):
    method = RandomMask(
        target_speedup=1.4, seed=seed, rates=rates, phases=phases, **RandomMask.quick
    ).fit(tiny(), tiny_corpus)
    windows = torch.randint(3, 90, (32, 48), generator=torch.Generator().manual_seed(5))
    # 32 windows of 48 tokens in 8 sublayers: five standard deviations are 2%.
    assert block_speedup(tiny(), method, windows) == pytest.approx(1.4, rel=0.02)
    assert method.facts["achieved_speedup"] == pytest.approx(1.4, rel=0.04)


def test_seeds_share_the_rates(tiny, tiny_corpus, matched):
    other = RandomMask(target_speedup=1.4, seed=3, **RandomMask.quick).fit(tiny(), tiny_corpus)
    assert torch.equal(other.tensors["rates"], matched.tensors["rates"])
    assert other.source_method().seed == 0


def test_uniform_needs_neither_source_nor_text(tiny):
    method = RandomMask(target_speedup=1.6, rates="uniform", source="no_such").fit(tiny())
    assert torch.equal(method.tensors["rates"], torch.full((LAYERS, 2), 1 / 1.6).double())
    assert method.max_speedup(LAYERS) == float("inf")


def test_shifted_meets_the_target_and_keeps_zero_and_one():
    rates = torch.tensor([[0.0, 1.0], [0.5, 0.9], [0.2, 1.0]], dtype=torch.float64)
    costs = torch.tensor([[1.0, 3.0]] * 3, dtype=torch.float64) * 1e6
    moved = shifted(rates, costs, 1.4)
    assert float(costs.sum() / (moved * costs).sum()) == pytest.approx(1.4, rel=1e-4)
    assert moved[0].tolist() == [0.0, 1.0]
    assert moved[2, 1] == 1.0
    fixed_rates = torch.tensor([[0.0, 1.0]] * 3, dtype=torch.float64)
    assert torch.equal(shifted(fixed_rates, costs, 2.0), fixed_rates)


def test_any_method_may_be_the_source(tiny, tiny_corpus):
    """Of a plan, whose rates are 0 and 1, the mask is that plan."""
    method = RandomMask(target_speedup=2.0, source="uls(spacing=even)", length=48)
    method.fit(tiny(), tiny_corpus)
    assert method.tensors["rates"].tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]
    assert method.max_speedup(LAYERS) == 2.0


def test_evicting_draws_the_same_and_is_a_setting_of_its_own(tiny, tiny_corpus, matched):
    model, found = tiny(), []
    evicting = RandomMask(target_speedup=1.4, kv="evict", **RandomMask.quick)
    evicting.fit(model, tiny_corpus)
    assert torch.equal(evicting.tensors["rates"], matched.tensors["rates"])
    for method in (matched, evicting):
        with attach(model, method) as trace:
            model(ids(2, 12))
            found.append((trace.gates(), trace.flops["kv_projection"]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] > found[1][1] == 0
    assert "kv" not in parameters_text(matched)
    assert "kv='evict'" in parameters_text(evicting)


def test_wrong_use_is_refused(tiny, tiny_corpus):
    with pytest.raises(UserError, match="give fit a corpus"):
        RandomMask(target_speedup=1.5).fit(tiny())
    with pytest.raises(UserError, match="unknown method 'skipgtp'; did you mean skipgpt"):
        RandomMask(target_speedup=1.5, source="skipgtp").max_speedup(LAYERS)
    model = tiny()
    unfitted = RandomMask(target_speedup=1.5)
    with pytest.raises(UserError, match="not fitted.*call .fit"), attach(model, unfitted):
        pass
