"""How a token is chosen from logits, and which drafted tokens stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rules = Callable[[Sequence[int], Tensor], Tensor]
"""``(written, logits [vocabulary]) -> logits``: what is made of logits after the tokens written.
Of these alone, in whatever order it is asked, and in memory of its own."""
_BROKEN = -1
_NO_NUMBER = "a logit of a text is not a number"


@dataclass(frozen=True, eq=False)
class Choice:
    """The likeliest token, or one that is drawn.

    Attributes:
        rules: what changes the logits before: penalties, temperature, top-k, top-p. The same for
            the draft and for the whole model, whose distributions are compared.
        sample: draw from the softmax of what they leave, with ``generator`` (None: torch's own).
    """

    rules: Rules | None = None
    sample: bool = False
    generator: torch.Generator | None = None

    def draw(self, written: Sequence[int], logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """A token for a draft, int64 ``[]``, and the distribution ``[vocabulary]`` that it was
        drawn from, None where nothing is drawn."""
        logits = self._ruled(written, logits)
        if not self.sample:
            return logits.argmax(-1), None
        share = logits.float().softmax(-1)
        # Whatever a draft says may be verified, but it has to be a distribution.
        share = torch.where(share.isfinite().all(), share, 1 / len(share))
        return self._drawn(share), share

    def judge(
        self,
        written: Sequence[int],
        drafted: Sequence[Tensor],
        shares: Sequence[Tensor | None],
        logits: Tensor,
    ) -> tuple[list[int], int, int]:
        """Which tokens of a draft stand.

        ``logits`` ``[drafted + 1, vocabulary]`` are the whole model's, after the tokens ``written``
        and after each drafted one. Returns the drafted tokens, how many of them stand, and the
        token that the whole model writes after those. Raises FloatingPointError where logits are
        not numbers: no token is the likeliest then.

        Sampling: a drafted token x stands with probability min(1, p(x) / q(x)); where it does not,
        one is drawn from max(0, p - q), normalised (arXiv 2211.17192, algorithm 1).
        """
        if self.sample:
            tokens = torch.stack(list(drafted)).tolist() if drafted else []
            return tokens, *self._judge_drawn(written, tokens, shares, logits)
        if self.rules is None:
            best = _likeliest(logits)
            *tokens_and_best, last = torch.cat((*(each[None] for each in drafted), best)).tolist()
            count = len(drafted)
            tokens, own = tokens_and_best[:count], [*tokens_and_best[count:], last]
            accepted = next((i for i in range(count) if own[i] != tokens[i]), count)
            return tokens, accepted, _number(own[accepted])
        tokens = torch.stack(list(drafted)).tolist() if drafted else []
        for place, row in enumerate(logits):
            ruled = self._ruled([*written, *tokens[:place]], row)
            token = _number(int(_likeliest(ruled[None])))
            if place == len(tokens) or token != tokens[place]:
                return tokens, place, token
        raise AssertionError("there is one row more than drafted tokens")

    def _judge_drawn(
        self,
        written: Sequence[int],
        tokens: Sequence[int],
        shares: Sequence[Tensor | None],
        logits: Tensor,
    ) -> tuple[int, int]:
        for place, row in enumerate(logits):
            own = self._ruled([*written, *tokens[:place]], row).float().softmax(-1)
            if place < len(tokens):
                token, share = tokens[place], shares[place]
                assert share is not None
                if self._stands(token, own, share):
                    continue
                rest = self._rest(own, share)
                # Nothing is left where the two differ by rounding alone.
                rest = torch.where(rest.any(), rest, own)
            else:
                rest = own
            if not bool(own.isfinite().all()):
                raise FloatingPointError(_NO_NUMBER)
            return place, int(self._drawn(rest))
        raise AssertionError("there is one row more than drafted tokens")

    def _stands(self, token: int, own: Tensor, share: Tensor) -> bool:
        chance = torch.rand((), device=own.device, generator=self.generator)
        return bool(chance * share[token] < own[token])

    def _rest(self, own: Tensor, share: Tensor) -> Tensor:
        return (own - share).clamp_min(0)

    def _ruled(self, written: Sequence[int], logits: Tensor) -> Tensor:
        return logits if self.rules is None else self.rules(written, logits)

    def _drawn(self, shares: Tensor) -> Tensor:
        return torch.multinomial(shares, 1, generator=self.generator)[0]


def _likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row, int64 ``[rows]``; negative where it is not a number, for
    that is the largest to argmax."""
    best = logits.argmax(-1)
    return best.masked_fill(logits.gather(-1, best[:, None])[:, 0].isnan(), _BROKEN)


def _number(token: int) -> int:
    if token == _BROKEN:
        raise FloatingPointError(_NO_NUMBER)
    return token
