"""What a task and a model ask of generation: obeyed as ``transformers`` does it, or refused.

A task asks in its ``generation_kwargs``, a model in the ``generation_config.json`` that it ships;
the task goes first. Decoding is greedy: a rule on the logits is applied before the likeliest token
is taken, and what would make another search of it is refused. Nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as rules

from dyndepth.common.errors import UserError

OBEYED: dict[str, Any] = {
    "sequence_bias": None,
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
"""Rules on the logits, in the order in which ``transformers`` applies them, each with the value
that changes nothing."""

ENDINGS = ("until", "max_gen_toks", "max_length", "max_new_tokens", "eos_token_id")
"""Settings that say where a text ends. The length is the task's alone: ``max_gen_toks`` new tokens
and, where the task gives it, ``max_length`` with the prompt. A model's are defaults for whoever
gives none, and a task always gives one."""

WITHOUT_EFFECT = frozenset(
    # of sampling
    {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
    # of beams
    | {"early_stopping", "length_penalty", "diversity_penalty"}
    # of assisted generation, which begins with prompt_lookup_num_tokens or an assistant
    | {"is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"}
    | {"assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind"}
    | {"target_lookbehind", "assistant_ensemble_weight", "speculation_type"}
    # they order the work, or say what else is returned
    | {"use_cache", "max_cache_len", "cache_config", "compile_config", "disable_compile"}
    | {"continuous_batching_config", "low_memory", "prefill_chunk_size", "renormalize_logits"}
    | {"output_attentions", "output_hidden_states", "output_scores", "output_logits"}
    | {"return_dict_in_generate"}
    # greedy decoding of one prompt asks for none of these tokens
    | {"pad_token_id", "bos_token_id", "decoder_start_token_id"}
    | {"transformers_version", "_from_model_config"}
)
"""Settings that change no text that is written greedily, whatever their value."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1, 1.0),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "use_mtp": (False,),
    "penalty_alpha": (0, 0.0),
    # A quantised cache rounds keys and values; the others hold what they are given.
    "cache_implementation": ("dynamic", "static", "hybrid", "sliding_window")
    + ("offloaded", "offloaded_static", "offloaded_hybrid"),
}
"""Settings that are refused, but for None and these values; whatever is named nowhere here is
refused, but for None."""


_OF_NO_PROMPT = {"sequence_bias", "bad_words_ids", "suppress_tokens"}
"""Rules that are the same for each prompt of a task, and hold a number for each token."""

DEFAULT_LENGTH = 256
"""Tokens that a task writes which says nothing, as in lm-eval."""


@dataclass(frozen=True)
class GenerationSettings:
    """How one request is completed.

    Attributes:
        limit: most tokens that are written.
        total: most tokens of prompt and text together, or None.
        until: texts before which the completion ends.
        ends: tokens that end it.
        obeyed: the rules of ``OBEYED`` that are in force, by name.
        who: whose request it is, for messages.
    """

    limit: int
    total: int | None
    until: list[str]
    ends: tuple[int, ...]
    obeyed: dict[str, Any]
    who: str
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls, model: Any, arguments: Mapping[str, Any], who: str, default_limit: int = DEFAULT_LENGTH
    ) -> GenerationSettings:
        """The settings of a request whose task gives ``arguments``.

        Raises UserError where a setting asks for another search than the greedy one, or is none.
        """
        try:
            given = dict(normalize_gen_kwargs(dict(arguments), default_limit))
        except (TypeError, ValueError) as fault:
            raise UserError(f"{who}: its generation settings can't be read: {fault}") from fault
        until = [word for word in given.pop("until") if word is not None]
        wrong = [word for word in until if not isinstance(word, str) or not word]
        if wrong:
            raise UserError(f"{who}: 'until' takes texts to stop at, not {wrong[0]!r}")
        own = _shipped(model)
        for name, value in given.items():
            _refuse(name, value, who)
        for name, value in own.items():
            if name not in given:
                _refuse(name, value, "the model's generation_config")
        asked = own | given
        ends = asked.get("eos_token_id")
        ends = list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]
        for name, values in {"eos_token_id": ends, "max_length": [given.get("max_length")]}.items():
            for value in values:
                if value is not None and type(value) is not int:
                    raise UserError(f"{who}: {name} takes whole numbers, not {value!r}")
        obeyed = {
            name: asked[name]
            for name, neutral in OBEYED.items()
            if asked.get(name) not in (None, neutral)
        }
        if asked.get("min_new_tokens") is not None:
            obeyed.pop("min_length", None)  # the former goes first, even where it is 0
        found = cls(given["max_gen_toks"], given.get("max_length"), until, tuple(ends), obeyed, who)
        if found.limit < 1:
            raise UserError(f"{who} generates {found.limit} tokens; it must be at least one")
        return found

    def check_room(self, most: int) -> None:
        """Raises UserError if a model of ``most`` positions has no room for what is written, or
        less than the task counts on."""
        if self.limit >= most:
            raise UserError(
                f"{self.who} generates {self.limit} tokens, which leaves no room in the {most} "
                "that the model takes; leave the task out"
            )
        if self.total is not None and self.total > most:
            raise UserError(
                f"{self.who} stops at {self.total} tokens with the prompt (max_length), and the "
                f"model takes {most}; give max_gen_toks"
            )

    def check_rules(self, vocabulary: int, device: torch.device) -> None:
        """Raises UserError for a rule that can't be applied to logits of so many tokens."""
        out = [end for end in self.ends if not 0 <= end < vocabulary]
        if out:
            raise UserError(
                f"{self.who}: eos_token_id holds {out[0]}, and the model knows {vocabulary} tokens"
            )
        found = self.rules([0], self.limit, device)
        try:
            if found is not None:
                for written in ([], [0] * (self.limit - 1)):
                    found(written, torch.zeros(vocabulary, device=device))
        except (TypeError, ValueError, IndexError, RuntimeError) as fault:
            raise UserError(
                f"{self.who}: its rules on the logits ({', '.join(self.obeyed)}) can't be applied "
                f"to the model's {vocabulary} tokens: {fault}"
            ) from fault

    def rules(self, prompt: Sequence[int], limit: int, device: torch.device) -> Rules | None:
        """What changes the logits after ``prompt`` (token ids), of which at most ``limit`` follow;
        None where nothing does. Raises UserError for a value that a rule can't have."""
        found = []
        for name in self.obeyed:
            try:
                rule = self._kept.get(name) or self._rule(name, prompt, limit, device)
            except (TypeError, ValueError) as fault:
                raise UserError(
                    f"{self.who}: {name} can't be {self.obeyed[name]!r}: {fault}"
                ) from fault
            found += [] if rule is None else [rule]
            if name in _OF_NO_PROMPT:
                self._kept[name] = rule
        return Rules(LogitsProcessorList(found), torch.tensor(prompt)) if found else None

    def _rule(self, name: str, prompt: Sequence[int], limit: int, device: torch.device) -> Any:
        """The rule called ``name``; None where there is nothing for it to do."""
        value, length, on = self.obeyed[name], len(prompt), {"device": str(device)}
        ids: Any = torch.tensor([prompt], device=device)
        ends: Any = torch.tensor(self.ends, device=device) if self.ends else None
        match name:
            case "sequence_bias":
                return rules.SequenceBiasLogitsProcessor(value)
            case "encoder_repetition_penalty":
                return rules.EncoderRepetitionPenaltyLogitsProcessor(value, ids)
            case "repetition_penalty":
                return rules.RepetitionPenaltyLogitsProcessor(value)
            case "no_repeat_ngram_size":
                return rules.NoRepeatNGramLogitsProcessor(value)
            case "encoder_no_repeat_ngram_size":
                return rules.EncoderNoRepeatNGramLogitsProcessor(value, ids)
            case "bad_words_ids":
                return rules.NoBadWordsLogitsProcessor(value, ends)
            case "min_length" if ends is not None:
                return rules.MinLengthLogitsProcessor(value, ends, **on)
            case "min_new_tokens" if ends is not None:
                return rules.MinNewTokensLengthLogitsProcessor(length, value, ends, **on)
            case "forced_bos_token_id":
                return rules.ForcedBOSTokenLogitsProcessor(value)
            case "forced_eos_token_id":
                return rules.ForcedEOSTokenLogitsProcessor(length + limit, value, **on)
            case "exponential_decay_length_penalty":
                return rules.ExponentialDecayLengthPenalty(tuple(value), ends, length)
            case "suppress_tokens":
                return rules.SuppressTokensLogitsProcessor(value, **on)
            case "begin_suppress_tokens":
                forced = length == 1 and "forced_bos_token_id" in self.obeyed
                return rules.SuppressTokensAtBeginLogitsProcessor(value, length + forced, **on)
        return None


@dataclass(frozen=True, eq=False)
class Rules:
    """Rules on the logits of one prompt's completion."""

    processors: LogitsProcessorList
    prompt: Tensor

    def __call__(self, written: Sequence[int], logits: Tensor) -> Tensor:
        """Logits ``[vocabulary]`` after the prompt and the tokens ``written``, in float32."""
        ids = torch.cat((self.prompt, torch.tensor(written, dtype=torch.long)))
        scores = logits.to(torch.float32, copy=True)
        return self.processors(ids[None].to(logits.device), scores[None])[0]  # type: ignore[arg-type]


def _shipped(model: Any) -> dict[str, Any]:
    """What the model's generation_config sets, as far as ``transformers`` knows it."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return {}
    known = GenerationConfig().to_dict()
    found = config.to_dict() if isinstance(config, GenerationConfig) else dict(config)
    of_tasks = {"max_length", "max_new_tokens", "do_sample"}
    return {
        name: value
        for name, value in found.items()
        if value is not None and name in known and name not in of_tasks
    }


def _refuse(name: str, value: Any, who: str) -> None:
    """Raise UserError for a setting that is neither obeyed nor without effect."""
    if name in OBEYED or name in ENDINGS or name in WITHOUT_EFFECT or value is None:
        return
    neutral = NEUTRAL.get(name, ())
    if value in neutral:
        return
    if name in ("do_sample", "num_beams"):
        raise UserError(
            f"{who} generates by sampling or beams ({name}={value!r}); "
            "only greedy generation is comparable (do_sample: false, num_beams: 1)"
        )
    instead = f"set it to {neutral[0]!r}" if neutral else "leave it out"
    if name == "stop_strings":
        instead = "give them as 'until'"
    raise UserError(
        f"{who} sets {name}={value!r}, which greedy generation has no place for; {instead} in the "
        "task's generation_kwargs"
    )
