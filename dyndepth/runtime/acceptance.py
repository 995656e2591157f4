"""What became of drafts: which tokens were proposed, which of them stand, and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Round:
    """One draft and its verification.

    Attributes:
        drafted: the tokens that were proposed, none where one was to be written alone.
        probabilities: what the draft gave to each of them, where it was asked; else empty.
        accepted: how many of them, from the first, the whole model takes, wherever the text ends.
        tokens: what was written: those, and one of the whole model's own. Fewer where the text
            came to its end.
        draft_s, verify_s: seconds, by the clock of the loop.
        reran: calls of ``Verified.rerun`` after it, each of which runs one block.
    """

    drafted: tuple[int, ...]
    accepted: int
    tokens: tuple[int, ...]
    probabilities: tuple[float, ...] = ()
    draft_s: float = 0.0
    verify_s: float = 0.0
    reran: int = 0


@dataclass
class Speculation:
    """The rounds of one attachment, all texts together, the first token of each left out.

    Attributes:
        rounds: in the order in which they were.
    """

    rounds: list[Round] = field(default_factory=list)

    @property
    def drafted(self) -> int:
        """Tokens that were proposed."""
        return sum(len(each.drafted) for each in self.rounds)

    @property
    def accepted(self) -> int:
        """Tokens of drafts that the whole model takes, those after a text's end among them; the one
        that it adds is not."""
        return sum(each.accepted for each in self.rounds)

    @property
    def acceptance(self) -> float | None:
        """Accepted of drafted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_verification(self) -> float | None:
        """Tokens written for each pass of the whole model; None before the first."""
        written = sum(len(each.tokens) for each in self.rounds)
        return written / len(self.rounds) if self.rounds else None

    @property
    def draft_s(self) -> float:
        """Seconds of all drafts."""
        return sum(each.draft_s for each in self.rounds)

    @property
    def verify_s(self) -> float:
        """Seconds of all verifications."""
        return sum(each.verify_s for each in self.rounds)
