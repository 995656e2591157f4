"""Which drafted tokens stand: the rule is exact, and the loop follows it to the end of a text."""

from __future__ import annotations

from collections import Counter
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chi2
from toys import Drafting

from dyndepth.runtime import choosing
from dyndepth.runtime.acceptance import Speculation
from dyndepth.runtime.choosing import Choice
from dyndepth.runtime.speculation import speculate

WORDS, READ, SAMPLES = 8, 3, 800


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model:
    """A language of 8 words, whose next one goes by the last two; drafts go by other numbers.

    What was read lies in the cache, so that a token too many or too few in it is read wrongly.
    """

    config = SimpleNamespace()

    def __init__(self):
        self.drafting = self.verifying = False
        self.replay = None
        self.speculation = Speculation()
        self.own = numbers(WORDS, WORDS, WORDS)
        self.other = 0.2 * self.own + numbers(WORDS, WORDS, WORDS, seed=1)

    def reject(self, tokens):
        """Nothing is counted."""

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.own)

    def __call__(self, ids, cache, **_):
        new = ids.view(1, 1, -1, 1)
        read, _ = cache.update(new, new, 0)
        read, count = read.flatten(), ids.shape[1]
        table = self.other if self.drafting else self.own
        logits = table[read[-count - 1 : -1], read[-count:]] if len(read) > count else None
        if logits is None:  # the first word of all has none before it
            logits = table[torch.cat((read[:1], read[:-1])), read]
        return SimpleNamespace(logits=logits[None])

    def forward(self, ids, cache):
        """As ``__call__``; only its signature is read."""


PROMPT = [3, 5]


def warm(written, logits):
    """Temperature 0.6, then the fewest words that make 0.9."""
    logits = logits / 0.6
    share, order = logits.softmax(-1).sort(descending=True)
    kept = share.cumsum(-1) - share < 0.9
    return logits.masked_fill(~torch.zeros_like(kept).scatter(-1, order, kept), -torch.inf)


def joint(rules):
    """The exact probability of each text, word by word."""
    own = Model().own
    chances = {}
    for text in product(range(WORDS), repeat=READ):
        chance, seen = 1.0, [*PROMPT]
        for word in text:
            logits = own[seen[-2], seen[-1]].double()
            chance *= float((rules([], logits) if rules else logits).softmax(-1)[word])
            seen.append(word)
        chances[text] = chance
    return chances


def surprise(choice, length=2):
    """By how much what is drawn differs from the exact distribution: chi-square's p, cells of less
    than 5 expected texts as one."""
    model, found = Model(), Counter()
    method = Drafting(length=length)
    for _ in range(SAMPLES):
        text: list[int] = []
        for tokens in speculate(model, model, method, PROMPT, limit=9, choice=choice):
            text += tokens
            if len(text) >= READ:
                break
        found[tuple(text[:READ])] += 1
    cells, rare = [], [0.0, 0]
    for text, chance in joint(choice.rules).items():
        if not chance and found[text]:
            return 0.0
        expected = SAMPLES * chance
        if expected < 5:
            rare = [rare[0] + expected, rare[1] + found[text]]
        else:
            cells.append((expected, found[text]))
    if rare[0] >= 5:
        cells.append(tuple(rare))
    else:
        assert rare[1] <= 25
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    return float(chi2.sf(statistic, len(cells) - 1))


class AlwaysStands(Choice):
    def _stands(self, token, own, share):
        return True


class RestIsOwn(Choice):
    def _rest(self, own, share):
        return own


class BonusUnruled(Choice):
    def judge(self, written, drafted, shares, logits):
        tokens, accepted, own = super().judge(written, drafted, shares, logits)
        if drafted and accepted == len(drafted):
            own = int(self._drawn(logits[-1].softmax(-1)))
        return tokens, accepted, own


class DraftUnruled(Choice):
    def draw(self, written, logits):
        _, share = super().draw(written, logits)
        return self._drawn(logits.softmax(-1)), share


class ShareUnruled(Choice):
    def draw(self, written, logits):
        token, _ = super().draw(written, logits)
        return token, logits.softmax(-1)


def made(kind, rules, seed=0):
    return kind(rules=rules, sample=True, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rules", [None, warm], ids=["plain", "warm"])
@pytest.mark.parametrize("length", [0, 2])
def test_texts_are_distributed_as_the_whole_models(rules, length):
    assert surprise(made(Choice, rules), length) > 1e-4


@pytest.mark.parametrize(
    ("kind", "rules"),
    [
        (AlwaysStands, None),
        (RestIsOwn, None),
        (BonusUnruled, warm),
        (DraftUnruled, warm),
        (ShareUnruled, warm),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_common_faults_would_show(kind, rules):
    # With drafts of one, its bonus is among the words that are looked at.
    assert surprise(made(kind, rules), 1 if kind is BonusUnruled else 2) < 1e-5


def test_the_rule_is_exact_in_float64(monkeypatch):
    """What stands, plus what is drawn where nothing does, is what the whole model says."""
    choice = Choice(sample=True)
    for seed in range(50):
        p, q = (3 * numbers(20, seed=100 * part + seed) for part in (1, 2))
        p, q = p.double().softmax(-1), q.double().softmax(-1)
        if seed % 2:  # words that one of the two leaves out
            p[:5] = q[3:8] = 0.0
            p, q = p / p.sum(), q / q.sum()
        stands = torch.minimum(p, q)
        rest = choice._rest(p, q)
        torch.testing.assert_close(
            stands + (1 - stands.sum()) * rest / rest.sum(), p, atol=1e-15, rtol=0
        )
        for token in range(20):
            edge = float(p[token] / q[token]) if q[token] else 0.0
            for chance in (0.0, 0.5, edge - 1e-9, edge + 1e-9):
                if 0 <= chance < 1 and q[token]:
                    monkeypatch.setattr(torch, "rand", lambda *_, c=chance, **__: torch.tensor(c))
                    # A float32 chance beside a float64 edge: told apart where they differ.
                    if abs(chance - edge) > 1e-6:
                        assert choice._stands(token, p, q) == (chance < edge)


def test_equal_distributions_always_stand():
    choice = made(Choice, None)
    logits = numbers(4, 50)
    for _ in range(200):
        drawn = [choice.draw([], row) for row in logits[:3]]
        drafted, shares = zip(*drawn, strict=True)
        assert choice.judge([], list(drafted), list(shares), logits)[1] == 3


def test_what_is_no_number_is_said():
    broken = numbers(2, 9)
    broken[1, 4] = torch.nan
    zero = torch.tensor(int(broken[0].argmax()))
    share = torch.nn.functional.one_hot(zero, 9).float()
    for choice in (Choice(), Choice(rules=lambda written, logits: logits), made(Choice, None)):
        shares = [share if choice.sample else None]
        with pytest.raises(FloatingPointError, match="not a number"):
            choice.judge([], [], [], broken[1:])
        with pytest.raises(FloatingPointError, match="not a number"):
            choice.judge([], [zero], shares, torch.stack((50 * share, broken[1])))


def test_a_draft_that_is_no_number_is_drawn_all_the_same():
    broken = torch.full((9,), torch.nan)
    token, share = made(Choice, None).draw([], broken)
    assert 0 <= int(token) < 9
    torch.testing.assert_close(share, torch.full((9,), 1 / 9))
    assert 0 <= int(Choice().draw([], broken)[0]) < 9


def test_a_mistake_ends_the_draft_where_it_is():
    logits = torch.nn.functional.one_hot(torch.tensor([4, 2, 7, 1]), 9).float()
    drafted = [torch.tensor(each) for each in (4, 2, 6)]
    for choice in (Choice(), Choice(rules=lambda written, logits: logits.clone())):
        assert choice.judge([1], drafted, [None] * 3, logits) == ([4, 2, 6], 2, 7)
        assert choice.judge([1], drafted[:2], [None] * 2, logits[:3]) == ([4, 2], 2, 7)
        assert choice.judge([1], [], [], logits[:1]) == ([], 0, 4)


def test_rules_see_what_was_written_before_each_token():
    seen = []

    def rules(written, logits):
        seen.append(list(written))
        return logits

    logits = torch.nn.functional.one_hot(torch.tensor([4, 2, 7]), 9).float()
    Choice(rules=rules).judge([8], [torch.tensor(4), torch.tensor(2)], [None, None], logits)
    assert seen == [[8], [8, 4], [8, 4, 2]]
    assert choosing.Choice(rules=rules).draw([8], logits[0])[1] is None
