"""The cost model of speculation, against throws of a coin and sums by hand."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from conftest import make_tiny, variants

from dyndepth.models.shapes import shape_config
from dyndepth.runtime.acceptance import Round
from dyndepth.runtime.draft_costs import (
    DraftCosts,
    Kind,
    best_length,
    best_rate,
    break_even,
    by_bytes,
    chance,
    pays,
    predicted_speedup,
    step_bytes,
    tokens_a_round,
)


def rounds(acceptance: float, length: int, count: int) -> list[Round]:
    """Drafts whose tokens stand by throws of a coin, until the first that does not."""
    throws = random.Random(0)
    found = []
    for _ in range(count):
        stands = [throws.random() < acceptance for _ in range(length)]
        accepted = next((at for at, one in enumerate(stands) if not one), length)
        found.append(Round((7,) * length, accepted, (7,) * (accepted + 1)))
    return found


def on_meta(name: str):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape_config(name), dtype=torch.bfloat16)


@pytest.mark.parametrize(("acceptance", "length"), [(0.7, 4), (0.95, 8), (0.2, 1), (0.5, 0)])
def test_tokens_a_round_are_those_of_thrown_coins(acceptance, length):
    thrown = rounds(acceptance, length, 20_000)
    mean = sum(len(each.tokens) for each in thrown) / len(thrown)
    assert tokens_a_round(acceptance, length) == pytest.approx(mean, rel=0.02)


def test_tokens_a_round_have_a_closed_form():
    assert tokens_a_round(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert tokens_a_round(1.0, 4) == 5
    assert tokens_a_round(0.0, 4) == 1


def test_the_acceptance_is_found_again_in_rounds():
    thrown = rounds(0.8, 4, 20_000)
    share = sum(each.accepted for each in thrown) / sum(len(each.drafted) for each in thrown)
    assert chance(thrown) == pytest.approx(0.8, abs=0.01)
    assert share < 0.65  # and is not the acceptance
    assert chance([Round((), 0, (7,))]) is None


def test_a_speedup_is_tokens_over_what_they_cost():
    costs = DraftCosts(draft=0.25, verify=1.5)
    assert predicted_speedup(0.5, 2, costs) == pytest.approx((1 + 0.5 + 0.25) / (0.25 + 0.25 + 1.5))
    assert predicted_speedup(0.5, 0, DraftCosts(0.3)) == 1.0


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.75, 0.97, 1.0])
@pytest.mark.parametrize("draft", [0.02, 0.3, 0.8, 1.2])
def test_the_best_length_is_that_beyond_which_a_token_costs_more_than_it_brings(acceptance, draft):
    costs = DraftCosts(draft, 1.1)
    best = best_length(acceptance, costs, most=30)
    # One token more is worth its a^(n+1), and the time that it takes at the rate of the round.
    length = 0
    while length < 30 and (
        acceptance ** (length + 1) > draft * predicted_speedup(acceptance, length, costs) + 1e-12
    ):
        length += 1
    assert best == length


def policies(most: int):
    """Every rule that says, of the kinds of the tokens so far, whether another is drafted."""
    seen = [kinds for n in range(most) for kinds in itertools.product((0, 1), repeat=n)]
    for answers in itertools.product((False, True), repeat=len(seen)):
        yield dict(zip(seen, answers, strict=True))


def rate_of(policy, kinds, costs, most) -> float:
    """Tokens for each unit of cost, over all that may be drafted."""
    tokens = cost = 0.0
    for path in itertools.product((0, 1), repeat=most):
        chance, stands, written, paid = 1.0, 1.0, 1.0, costs.verify
        for one in path:
            chance *= kinds[one].share
        for length, one in enumerate(path):
            if not policy[path[:length]]:
                break
            paid += costs.draft
            stands *= kinds[one].stands
            written += stands
        tokens, cost = tokens + chance * written, cost + chance * paid
    return tokens / cost


@pytest.mark.parametrize("draft", [0.15, 0.35, 0.6])
@pytest.mark.parametrize(
    "kinds", [(Kind(0.6, 0.95), Kind(0.4, 0.3)), (Kind(0.5, 0.7), Kind(0.5, 0.7))]
)
def test_no_policy_brings_more_than_the_rule(kinds, draft):
    """All 128 policies for drafts of at most 3 tokens, each summed over all drafts."""
    costs = DraftCosts(draft, 1.2)
    best = max(rate_of(policy, kinds, costs, 3) for policy in policies(3))
    assert best_rate(kinds, costs, 3) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("acceptance", [0.0, 0.4, 0.8, 1.0])
def test_where_all_tokens_are_alike_the_rule_is_the_best_length(acceptance):
    costs, kinds = DraftCosts(0.3, 1.1), (Kind(1.0, acceptance), Kind(0.0, 0.0))
    length = best_length(acceptance, costs, most=9)
    rate = best_rate(kinds, costs, 9)
    assert rate == pytest.approx(predicted_speedup(acceptance, length, costs))
    drafted = 0
    while drafted < 9 and pays(acceptance**drafted, acceptance, rate, costs):
        drafted += 1
    assert drafted == length


def test_break_even_is_where_the_speedup_is_one():
    assert break_even(DraftCosts(0.4)) == pytest.approx(0.4)
    costs = DraftCosts(0.2, 1.5)
    for length in (1, 3, 6):
        assert predicted_speedup(break_even(costs, length), length, costs) == pytest.approx(1)
    assert break_even(costs) == min(break_even(costs, length) for length in range(1, 65))
    assert break_even(costs) < break_even(costs, 1)  # one token does not pay for the verification
    assert break_even(DraftCosts(1.01)) is None
    assert break_even(DraftCosts(0.0)) == 0


@variants()
def test_bytes_of_a_step_are_those_of_all_weights_but_the_embeddings(family, attn):
    model = make_tiny(family, attn)
    weights = step_bytes(model)
    inside = model.get_decoder()
    tables = [m for m in inside.modules() if isinstance(m, torch.nn.Embedding)]
    others = {id(p): p for p in model.parameters()}
    for table in tables:
        others.pop(id(table.weight), None)
    expected = sum(p.numel() * 4 for p in others.values())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected += model.get_input_embeddings().weight.numel() * 4 * tied
    # Norms around the embeddings are read, and are not worth a place in the model.
    assert weights.step == pytest.approx(expected, rel=0.005)
    full = torch.ones(weights.blocks.shape, dtype=torch.bool)
    assert by_bytes(model, full) == DraftCosts(1.0, 1.0)
    assert by_bytes(model, ~full).draft == pytest.approx(weights.rest / weights.step)


def test_a_draft_costs_what_it_runs(tiny):
    tiny = tiny()
    weights = step_bytes(tiny)
    plan = torch.ones(4, 2, dtype=torch.bool)
    plan[1, 0] = plan[2, 1] = False
    layers = tiny.model.layers
    left_out = [layers[1].self_attn, layers[1].input_layernorm]
    left_out += [layers[2].mlp, layers[2].post_attention_layernorm]
    missing = sum(p.numel() * 4 for module in left_out for p in module.parameters())
    assert by_bytes(tiny, plan).draft == pytest.approx(1 - missing / weights.step)
    half = by_bytes(tiny, torch.full((4, 2), 0.5)).draft
    assert half == pytest.approx((float(weights.blocks.sum()) / 2 + weights.rest) / weights.step)
    twice = by_bytes(tiny, plan, readouts=2).draft - by_bytes(tiny, plan).draft
    assert twice == pytest.approx(2 * weights.head_share)
    attention = layers[1].self_attn
    kept = (attention.k_proj.weight.numel() + attention.v_proj.weight.numel()) * 4
    more = by_bytes(tiny, plan, projected=True).draft - by_bytes(tiny, plan).draft
    assert more == pytest.approx(kept / weights.step, rel=0.05)  # norms left aside


def test_a_shape_is_priced_without_its_memory():
    model = on_meta("shape:llama-3-8b")
    weights = step_bytes(model)
    assert weights.step == 2 * (8_030_261_248 - 128256 * 4096)
    assert weights.head_share == pytest.approx(0.07, abs=0.001)
    half = torch.zeros(32, 2, dtype=torch.bool)
    half[:16] = True
    assert by_bytes(model, half).draft == pytest.approx(0.5 + weights.head_share / 2, abs=1e-4)


def test_what_makes_no_sense_is_refused(tiny):
    with pytest.raises(ValueError, match=r"must be \[4, 2\]"):
        by_bytes(tiny(), torch.ones(3, 2))
    with pytest.raises(ValueError, match="a probability"):
        tokens_a_round(1.1, 2)
    with pytest.raises(ValueError, match="a length of 0 or more"):
        predicted_speedup(0.5, -1, DraftCosts(0.5))
    with pytest.raises(ValueError, match="costs are 0 or more"):
        DraftCosts(0.5, 0.0)
