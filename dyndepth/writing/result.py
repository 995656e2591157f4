"""A text that was written, and what writing it came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dyndepth.runtime.acceptance import Round, Speculation

Finish = Literal["end", "stop", "limit"]


@dataclass(frozen=True)
class Proposal:
    """A draft in words: what was proposed, and what was written instead.

    Attributes:
        drafted: the text of each drafted token.
        accepted: how many of them, from the first, the whole model takes; as everywhere a property
            of the draft, wherever the text ends.
        own: the text of the token that the whole model added; None where the text ended before.
        probabilities: what the draft gave to each token, where it was asked; else empty.
        unwritten: how many of the accepted ones the text left out, as it had ended.
    """

    drafted: tuple[str, ...]
    accepted: int
    own: str | None
    probabilities: tuple[float, ...] = ()
    unwritten: int = 0

    @property
    def written(self) -> int:
        """Drafted tokens that are in the text."""
        return self.accepted - self.unwritten

    @property
    def judged(self) -> int:
        """Drafted tokens of which it is known whether the whole model takes them: the accepted
        ones, and the first that is not. The others follow tokens that it does not take."""
        return min(self.accepted + 1, len(self.drafted))


@dataclass(frozen=True)
class Generated:
    """A text that was written after a prompt.

    Attributes:
        text: what was written, without special tokens and without what it stopped at.
        tokens: the token ids that were written, all of them.
        pieces: the text of each of them.
        finish: why it ends: by a token that ends texts, at a text to stop at, or at the limit.
        prompt: the end of the prompt, in words.
        prompt_tokens: how many tokens the prompt has.
        method: the spec of the method that wrote it.
        seconds: from the prompt's tokens to the last one written; a single time, which says little.
        totals: tokens and FLOPs, as ``Trace.totals`` has them: ``block_flops``, ``total_flops``,
            ``dense_block_flops``, ``dense_total_flops``, ``by_cause``.
        speculation: the rounds of drafts and verifications, for a method that speculates.
        proposals: the same in words.
    """

    text: str
    tokens: tuple[int, ...]
    pieces: tuple[str, ...] = field(repr=False)
    finish: Finish
    prompt: str
    prompt_tokens: int
    method: str
    seconds: float
    totals: dict[str, Any] = field(repr=False)
    speculation: Speculation | None = field(default=None, repr=False)
    proposals: tuple[Proposal, ...] = field(default=(), repr=False)

    @property
    def tokens_per_s(self) -> float:
        """Tokens written a second, the time of the prompt included."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    @property
    def block_speedup(self) -> float:
        """Dense FLOPs / executed FLOPs of the blocks; 1 of a method that speculates."""
        return float(self.totals["dense_block_flops"] / self.totals["block_flops"])

    @property
    def total_speedup(self) -> float:
        """The same over everything: LM head, what the method adds, and drafts."""
        return float(self.totals["dense_total_flops"] / self.totals["total_flops"])

    @property
    def rounds(self) -> list[Round]:
        """Drafts and their verifications; empty of a method that does not speculate."""
        return [] if self.speculation is None else self.speculation.rounds

    @property
    def acceptance(self) -> float | None:
        """Accepted of drafted tokens, those after a text's end among both; None where none was
        drafted."""
        return None if self.speculation is None else self.speculation.acceptance

    @property
    def tokens_per_verification(self) -> float | None:
        """Tokens written for each pass of the whole model after the prompt's; None where there was
        none, and of a method that does not speculate."""
        return None if self.speculation is None else self.speculation.tokens_per_verification

    def statistics(self) -> dict[str, Any]:
        """All of it but texts and rounds, as plain JSON."""
        found = {
            "method": self.method,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "finish": self.finish,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "block_flops_speedup": self.block_speedup,
            "total_flops_speedup": self.total_speedup,
            "flops": {key: value for key, value in self.totals["by_cause"].items() if value},
        }
        if self.speculation is not None:
            found |= {
                "verifications": len(self.rounds),
                "drafted": self.speculation.drafted,
                "accepted": self.speculation.accepted,
                "acceptance": self.acceptance,
                "tokens_per_verification": self.tokens_per_verification,
                "draft_s": self.speculation.draft_s,
                "verify_s": self.speculation.verify_s,
            }
        return found
