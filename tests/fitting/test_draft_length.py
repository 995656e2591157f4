"""When a draft ends, against the rules written out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from dyndepth.fitting.drafting import COST, Drafting
from dyndepth.method import Draft, Verified
from dyndepth.runtime.draft_costs import DraftCosts, Kind, best_length, best_rate


@dataclass(kw_only=True)
class Plain(Drafting):
    """Drafts with everything."""

    name = "plain"
    granularity = "static"
    paper = "test"

    def start(self, context):
        return torch.ones(context.layers, 2, dtype=torch.bool)


def priced(cost: float, verify: float = 1.0, **given) -> Plain:
    method = Plain(adaptive="bytes", **given)
    method.facts[COST] = {"draft": cost, "verify": verify}
    return method


def unread():
    raise AssertionError("nobody asked for probabilities")


def drafted(method, memory, probabilities=None) -> int:
    """Tokens of one draft, of these probabilities; None: nobody may ask for them."""
    longest = 99 if probabilities is None else len(probabilities)
    for length in range(longest + 1):
        read = unread if probabilities is None else partial(list, probabilities[:length])
        if not method.more(Draft(length, read, memory)):
            return length
    raise AssertionError("it never ends")


def test_a_fixed_length_reads_no_probability():
    assert drafted(Plain(stop=0.0, length=5), {}) == 5
    assert drafted(Plain(stop=0.0, length=0), {}) == 0


@pytest.mark.parametrize(
    ("probabilities", "length"),
    [([0.9, 0.8, 0.79, 0.99], 3), ([0.1, 0.9], 1), ([0.9] * 4, 4), ([0.8] * 4, 4)],
)
def test_a_draft_stops_after_the_first_token_that_it_is_not_sure_of(probabilities, length):
    assert drafted(Plain(stop=0.8, length=4), {}, probabilities) == length


def learnt(method, acceptance: float, rounds: int = 60):
    """Memory after drafts of which this share stood."""
    memory, owed = {}, 0.0
    for _ in range(rounds):
        memory["drafting.sure"] = torch.ones(1, 1, dtype=torch.bool)
        owed += acceptance
        accepted = int(owed >= 1)
        owed -= accepted
        method.verified(Verified(1, accepted, memory))
    return memory


@pytest.mark.parametrize("cost", [0.1, 0.5])
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_where_all_tokens_are_alike_it_is_the_best_length_for_what_was_seen(acceptance, cost):
    """Ten imagined tokens, of which eight stood, and each round worth 0.9 of the next."""
    method = priced(cost, length=12, stop=0.0)
    memory = learnt(method, acceptance)
    stood = judged = owed = 0.0
    for _ in range(60):
        owed += acceptance
        stood, judged = 0.9 * stood + (owed >= 1), 0.9 * judged + 1
        owed -= owed >= 1
    seen = (8 + stood) / (10 + judged)
    assert drafted(method, memory) == best_length(seen, DraftCosts(cost), most=12)
    assert (drafted(method, memory) > 0) == (seen > cost)


def test_tokens_of_two_kinds_count_for_what_each_is_worth():
    """Sure tokens stand, unsure ones do not: an unsure one ends the draft, a sure one does not."""
    method, memory = priced(0.3, length=6, stop=0.8), {}
    for _ in range(40):
        memory["drafting.sure"] = torch.tensor([[True, True, False]])
        method.verified(Verified(3, 2, memory))
    assert drafted(method, memory, [0.9, 0.9, 0.1, 0.9, 0.9, 0.9]) == 3
    longer = drafted(method, memory, [0.9] * 6)
    assert longer > 3
    stood = sum(2 * 0.9**age for age in range(40))
    sure = (4.5 + stood) / (5 + stood)
    unsure = 1.5 / (5 + stood / 2)
    share = (5 + stood) / (10 + 1.5 * stood)
    kinds = (Kind(share, sure), Kind(1 - share, unsure))
    rate = best_rate(kinds, DraftCosts(0.3), 6)
    ahead = share * sure + (1 - share) * unsure
    assert longer == next((n for n in range(6) if sure**n * ahead <= rate * 0.3), 6)


def test_only_tokens_that_were_judged_are_learnt_from():
    method, memory = priced(0.3, length=6, stop=0.0), {}
    method.verified(Verified(5, 2, memory))
    assert memory["drafting.judged"].tolist() == [[[2.0, 3.0], [0.0, 0.0]]]
    method.verified(Verified(2, 2, memory))
    assert memory["drafting.judged"][0, 0].tolist() == pytest.approx([2 * 0.9 + 2, 3 * 0.9 + 2])


def test_a_text_on_which_drafts_failed_is_tried_again_and_others_are_not_touched():
    method = priced(0.6, length=4, stop=0.0)
    memory = learnt(method, 0.0)
    waits = 0
    while not drafted(method, memory):
        waits += 1
        assert waits < 60
    assert waits > 3
    assert drafted(method, {}) > 0
    assert set(vars(method)) == set(vars(priced(0.6)))


def test_it_never_drafts_where_a_token_costs_a_step():
    assert drafted(priced(1.0, stop=0.0, length=4), {}) == 0
    assert drafted(priced(1.0, length=4), {}, [1.0] * 4) == 0


def test_it_drafts_only_what_is_faster_than_steps_with_all_that_a_verification_costs():
    """(8 + .6) / (10 + 10) tokens are held to stand: worth .3 each, but not .3 for a round, too."""
    memory = learnt(priced(0.3, stop=0.0), 0.1)
    assert drafted(priced(0.3, stop=0.0), dict(memory)) == 1
    assert drafted(priced(0.3, verify=1.3, stop=0.0), dict(memory)) == 0
