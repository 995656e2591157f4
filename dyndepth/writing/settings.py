"""How a text is to be written: checked, and in the words of ``transformers``."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dyndepth.common.errors import UserError


@dataclass(frozen=True)
class Settings:
    """How a text is to be written.

    Attributes:
        max_new_tokens: most tokens that are written.
        temperature: what logits are divided by before a token is drawn; 0: none is drawn, the
            likeliest is taken.
        top_k: draw among the so many likeliest; None or 0: among all.
        top_p: draw among the likeliest that together have this probability; None: among all.
        stop: texts that end what is written, and are no part of it.
        seed: of the draws.

    Raises UserError for what is none of these.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, 1)
        _whole("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise UserError(f"seed takes a whole number below 2**63, not {self.seed}")
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature takes a number of at least 0 (0: the likeliest token is taken), not "
                f"{self.temperature!r}"
            )
        if self.top_k is not None:
            _whole("top_k", self.top_k, 0)
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"top_p takes a number above 0 and at most 1, not {self.top_p!r}")
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and not self.temperature:
                raise UserError(
                    f"{name} is of drawn tokens, and at temperature 0 none is drawn; give a "
                    "temperature above 0, or leave it out"
                )
        if not all(isinstance(each, str) and each for each in self.stop):
            raise UserError(f"stop takes texts that are not empty, not {self.stop!r}")

    def config(self, model: Any, tokenizer: Any) -> Any:
        """The ``GenerationConfig`` of ``model`` with these settings in it. What else the model
        ships stays: penalties, and the tokens that end a text."""
        config = copy.deepcopy(model.generation_config)
        draws = self.temperature > 0
        config.do_sample = draws
        config.temperature = float(self.temperature) if draws else 1.0
        config.top_p = 1.0 if self.top_p is None else float(self.top_p)
        # Of a greedy search transformers wants its own default, which does nothing there.
        config.top_k = (self.top_k or 0) if draws else 50
        config.max_new_tokens, config.max_length = self.max_new_tokens, None
        config.num_beams = config.num_return_sequences = 1
        config.use_cache, config.return_dict_in_generate = True, False
        if config.eos_token_id is None:
            config.eos_token_id = tokenizer.eos_token_id
        if config.pad_token_id is None:
            own = getattr(tokenizer, "pad_token_id", None)
            config.pad_token_id = tokenizer.eos_token_id if own is None else own
        return config

    def cut(self, text: str) -> tuple[str, bool]:
        """``text`` up to the first of ``stop`` in it, and whether there is one."""
        ends = [place for place in (text.find(each) for each in self.stop) if place >= 0]
        return (text[: min(ends)], True) if ends else (text, False)


def checked(stop: str | Sequence[str] = (), **given: Any) -> Settings:
    """``Settings`` with one text to stop at, or several."""
    if not isinstance(stop, str | Sequence):
        raise UserError(f"stop takes a text or several, not {stop!r}")
    return Settings(stop=(stop,) if isinstance(stop, str) else tuple(stop), **given)


def _whole(name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise UserError(f"{name} takes a whole number of at least {least}, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
