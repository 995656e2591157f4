"""A digest that says what a tokenizer makes of texts."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from dyndepth.common.digests import brought_code, facts_digest

PROBE = (
    "Hello world, it's 2018!",
    " a  b\n\n\tc \n",
    "Zürich e\u0301 ﬁ 中文 \U0001f600",
    "<s></s><|im_end|><|endoftext|>",
    "",
)
"""Texts that tokenizers with other rules read otherwise."""


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits that identify what a tokenizer makes of texts and chats, and of tokens.

    A hash over its rules, vocabulary, special tokens and chat template, and over what it makes of
    ``PROBE``. Where it lies does not count, nor do padding and truncation, which are asked for in
    each call. Tokenizers of any class have one.
    """
    ids = [
        tokenizer(list(PROBE), **how)["input_ids"] for how in ({}, {"add_special_tokens": False})
    ]
    names = ("bos_token_id", "eos_token_id", "unk_token_id", "add_bos_token", "add_eos_token")
    special = dict(getattr(tokenizer, "special_tokens_map", {}))
    special.pop("pad_token", None)
    facts = {
        "rules": _rules(tokenizer),
        "special": special,
        "template": getattr(tokenizer, "chat_template", None),
        "longest": getattr(tokenizer, "model_max_length", None),
        "named": {name: getattr(tokenizer, name, None) for name in names},
        "read": ids,
        "written": [tokenizer.decode(row) if row else "" for row in ids[0]]
        if hasattr(tokenizer, "decode")
        else [],
        "code": brought_code(tokenizer),
    }
    return facts_digest(facts)[:16]


def _rules(tokenizer: Any) -> Any:
    """What a tokenizer does by: the backend's own description, else its vocabulary and files."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    if not hasattr(tokenizer, "get_vocab"):
        return type(tokenizer).__name__
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(each) for each in tokenizer.save_vocabulary(folder) or () if each]
        contents = [hashlib.sha256(each.read_bytes()).hexdigest() for each in files]
    return [type(tokenizer).__name__, tokenizer.get_vocab(), contents]
