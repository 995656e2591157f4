"""How prompts are put to an instruct model: chat template, few-shot turns, system instruction.

The names and what they do are lm-eval's. Its tasks make the conversations; which template writes
them, and whether it can, is decided here. Texts that are scored whole have no prompt, and stay as
they are.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from dyndepth.common.errors import UserError

DEFAULT = "default"
"""Name of the template that a tokenizer with a single one has."""


@dataclass(frozen=True)
class Chat:
    """Lm-eval's three settings of a prompt.

    Attributes:
        apply_chat_template: False, True for the tokenizer's own template, or a template's name.
        fewshot_as_multiturn: few-shot examples are turns of the conversation, not one text; None
            as lm-eval's command line has it: wherever a template is applied.
        system_instruction: put before the task's own description, with a template or without.
    """

    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None

    def __post_init__(self) -> None:
        applied = bool(self.apply_chat_template)
        if self.fewshot_as_multiturn and not applied:
            raise UserError(
                "--fewshot_as_multiturn makes turns of a conversation, which plain text has not; "
                "give --apply_chat_template as well"
            )
        turns = applied if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn
        object.__setattr__(self, "fewshot_as_multiturn", turns)

    def settings(self) -> dict[str, Any]:
        """The settings by name, as ``evaluate`` here and lm-eval's take them."""
        return asdict(self)

    def building(self, language_model: Any) -> dict[str, Any]:
        """What a task's ``build_all_requests`` is to be given for ``language_model``."""
        applied = bool(self.apply_chat_template)
        return self.settings() | {
            "apply_chat_template": applied,
            "chat_template": language_model.apply_chat_template if applied else None,
        }

    def asked(self) -> dict[str, str]:
        """What a cell's identity says of the settings; everything empty where prompts are plain
        text."""
        applied = bool(self.apply_chat_template)
        turns = "yes" if self.fewshot_as_multiturn else "no"
        return {
            "apply_chat_template": _named(self.apply_chat_template) if applied else "",
            "fewshot_as_multiturn": turns if applied else "",
            "system_instruction": self.system_instruction or "",
        }

    def identity(self, tokenizer: Any) -> dict[str, str]:
        """``asked``, and a digest of the template's text. Raises UserError as ``template_of``."""
        template = template_of(tokenizer, self.apply_chat_template)
        digest = "" if template is None else hashlib.sha256(template.encode()).hexdigest()[:16]
        return self.asked() | {"chat_template_fingerprint": digest}

    def check(self, tokenizer: Any) -> None:
        """Raises UserError where the tokenizer has no such template, or one that can't write what
        is asked of it: turns, or the system instruction, which lm-eval would drop."""
        template = template_of(tokenizer, self.apply_chat_template)
        if template is None:
            return
        from jinja2 import TemplateError

        question = {"role": "user", "content": "question"}
        answer = {"role": "assistant", "content": "answer"}
        turns = [question, answer, question] if self.fewshot_as_multiturn else [question]
        system = self.system_instruction
        started = [{"role": "system", "content": system}] if system else []
        try:
            _written(tokenizer, template, turns)
        except (TemplateError, ValueError, TypeError) as fault:
            raise UserError(
                f"the tokenizer's chat template can't write a conversation: {_one_line(fault)}; "
                "leave --apply_chat_template out"
            ) from fault
        try:
            kept = (system or "").strip() in _written(tokenizer, template, started + turns)
        except (TemplateError, ValueError, TypeError):
            kept = False
        if not kept:
            raise UserError(
                "the tokenizer's chat template has no place for a system instruction; leave "
                "--system_instruction out"
            )


PLAIN = Chat()
"""Prompts as the tasks' files have them."""


def template_of(tokenizer: Any, asked: bool | str) -> str | None:
    """The text (Jinja) of the template that is ``asked`` for, as ``Chat.apply_chat_template``; None
    where none is.

    Raises UserError where the tokenizer has none, or none of that name.
    """
    if not asked:
        return None
    found = getattr(tokenizer, "chat_template", None)
    if not found:
        raise UserError(
            "the tokenizer has no chat template, as those of base models have none; leave "
            "--apply_chat_template out, or take the instruct model"
        )
    templates = found if isinstance(found, dict) else {DEFAULT: found}
    name = _named(asked)
    if name not in templates:
        raise UserError(
            f"the tokenizer has no chat template {name!r}; it has {', '.join(sorted(templates))}"
        )
    return str(templates[name])


def _named(asked: bool | str) -> str:
    return asked if isinstance(asked, str) else DEFAULT


def _written(tokenizer: Any, template: str, turns: list[dict[str, str]]) -> str:
    return str(
        tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    )


def _one_line(fault: Exception) -> str:
    return " ".join(str(fault).split())
