"""Tokenizers of the kinds that models have, trained in a moment on a few words."""

import random
from functools import cache
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
WORDS = (
    *("question", "answer", "yes", "no", "maybe", "red", "green", "blue", "hello", "there", "good"),
    *("day", "who", "are", "you", "12", "305", "0.5", "x,", "y.", "Is", "it?", "user", "system"),
)
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template that ends, as most do, where the answer is to begin."""
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
"""What some templates begin with."""


def _lines() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=12)) + "\n" for _ in range(60)]


def _byte_level() -> tuple[Tokenizer, Any]:
    """As GPT-2, Llama-3, Qwen."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )


def _metaspace() -> tuple[Tokenizer, Any]:
    """As Llama-2 and Mistral: a space before the text itself."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return made, trainers.BpeTrainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False)


def _prepended() -> tuple[Tokenizer, Any]:
    """As older files of Llama-2: the space before the text is a normaliser's, nothing splits."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Without a pre-tokenizer a token may span words, and so the join of context and continuation.
    return made, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False, max_token_length=8
    )


def _unigram() -> tuple[Tokenizer, Any]:
    """As T5 and XLNet."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    return made, trainers.UnigramTrainer(
        vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )


def _word_piece() -> tuple[Tokenizer, Any]:
    """As BERT: white space is lost."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=SPECIAL, show_progress=False
    )


KINDS = {
    "byte-level": _byte_level,
    "metaspace": _metaspace,
    "prepended": _prepended,
    "unigram": _unigram,
    "word-piece": _word_piece,
}


@cache
def _trained(kind: str) -> str:
    made, trainer = KINDS[kind]()
    made.train_from_iterator(_lines(), trainer)
    return made.to_str()


def tokenizer(kind: str, bos: bool = False, eos: bool = False, template: str = CHAT) -> Any:
    """A tokenizer that puts BOS before and EOS after each text, or not."""
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer.from_str(_trained(kind))
    single = "<s> " * bos + "$A" + " </s>" * eos
    ids = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    found = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    found.chat_template = template
    return found


def letters() -> Any:
    """One token a character, as many as the tiny models know."""
    from transformers import PreTrainedTokenizerFast

    ids = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(32 + n): 3 + n for n in range(93)}
    made = Tokenizer(models.BPE(vocab=ids, merges=[]))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def byte_tokenizer() -> Any:
    """One token a byte, without special tokens in texts."""
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: 3 + i for i, c in enumerate(letters)}
    made = Tokenizer(models.BPE(vocab=ids, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
