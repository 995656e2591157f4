"""Routing traces: which sublayers each token of some documents executed, in one compact file.

``record`` runs an attached model and keeps the gates as executed; a ``Routes`` is saved as
safetensors (one bit a gate) and gives tidy tables by sublayer, by position and by token. A
recorded cell's method is made again in ``dyndepth.routes.recorded``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.method import SUBLAYERS

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod


LAYOUT = 1
"""Version of the file's layout; others are refused."""
_COLUMNS = ("target_speedup", "seed", "phases")
_ENTRIES = ("documents", "lengths", "prompt_lengths", "vocabulary", "identity")

Phase = Literal["prompt", "generation"]


@dataclass(frozen=True, eq=False)
class Routes:
    """The gates of one method on some documents, laid end to end.

    Attributes:
        gates: bool ``[tokens, layers, 2]`` (attention, mlp), True = executed.
        token_ids: int64 ``[tokens]``.
        documents: their ids, in order.
        lengths: tokens of each.
        prompt_lengths: how many of each document's first tokens belong to the prompt phase.
        vocabulary: text of each token id that occurs.
        identity: what was run: method, parameters, phases, target speedup, seed, model and more,
            in plain JSON values; for a sweep's cell its identity, and its hash as ``cell``.
    """

    gates: np.ndarray
    token_ids: np.ndarray
    documents: tuple[str, ...]
    lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    vocabulary: Mapping[int, str]
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens, count = sum(self.lengths), len(self.documents)
        if not (
            self.gates.dtype == bool
            and self.gates.ndim == 3
            and self.gates.shape[0] == tokens == len(self.token_ids)
            and self.gates.shape[2] == len(SUBLAYERS)
            and count == len(self.lengths) == len(self.prompt_lengths) == len(set(self.documents))
            and all(0 <= p <= n for p, n in zip(self.prompt_lengths, self.lengths, strict=True))
            and set(self.token_ids.tolist()) <= set(self.vocabulary)
        ):
            raise ValueError("the parts of these routes do not fit together")

    @property
    def label(self) -> str:
        """Method, parameters that are not its defaults, and target speedup, for legends."""
        name = self.identity.get("spec", self.identity.get("method", "?"))
        speedup = self.identity.get("target_speedup")
        return f"{name} at {speedup:g}×" if speedup is not None else str(name)

    def document(self, document: str) -> slice:
        """The rows of one document. Raises UserError, with the ids there are, for another."""
        if document not in self.documents:
            raise UserError(
                f"these routes hold no document {document!r}; they hold {', '.join(self.documents)}"
            )
        index = self.documents.index(document)
        first = sum(self.lengths[:index])
        return slice(first, first + self.lengths[index])

    def strings(self, rows: slice = slice(None)) -> list[str]:
        """The text of each token."""
        return [self.vocabulary[token] for token in self.token_ids[rows].tolist()]

    def positions(self) -> np.ndarray:
        """Index of each token in its document: int64 ``[tokens]``."""
        return np.concatenate([np.arange(length) for length in (*self.lengths, 0)])

    def of_phase(self, phase: Phase | None) -> np.ndarray:
        """Which tokens belong to ``phase``: bool ``[tokens]``; None: all of them."""
        if phase is None:
            return np.ones(len(self.token_ids), dtype=bool)
        generation = self.positions() >= np.repeat(self.prompt_lengths, self.lengths)
        return generation if phase == "generation" else ~generation

    # --- tables ---------------------------------------------------------------------------------

    def by_sublayer(self, phase: Phase | None = None) -> pd.DataFrame:
        """One row a sublayer: ``layer`` (from 0), ``sublayer``, ``executed``, ``tokens``."""
        gates = self.gates[self.of_phase(phase)]
        rows = [
            (layer, sublayer, gates[:, layer, index].mean() if len(gates) else np.nan, len(gates))
            for layer in range(gates.shape[1])
            for index, sublayer in enumerate(SUBLAYERS)
        ]
        return pd.DataFrame(rows, columns=["layer", "sublayer", "executed", "tokens"])

    def by_position(self, bins: int = 16, phase: Phase | None = None) -> pd.DataFrame:
        """One row a range of positions and kind of sublayer, over all blocks.

        Columns: ``first`` and ``last`` (positions in the document, both included), ``sublayer``,
        ``executed``, ``tokens``. The longest document is cut into at most ``bins`` equal ranges;
        those without a token are left out. Raises UserError for ``bins`` below 1.
        """
        if bins < 1:
            raise UserError(f"by_position needs at least 1 bin, not {bins}")
        width = -(-max(self.lengths, default=1) // bins)
        chosen = self.of_phase(phase)
        place, gates = self.positions()[chosen] // width, self.gates[chosen]
        rows = []
        for index in np.unique(place).tolist():
            executed = gates[place == index].mean((0, 1))
            span = (index * width, min((index + 1) * width, max(self.lengths)) - 1)
            count = int((place == index).sum())
            rows += [(*span, kind, executed[i], count) for i, kind in enumerate(SUBLAYERS)]
        return pd.DataFrame(rows, columns=["first", "last", "sublayer", "executed", "tokens"])

    def by_token(self, minimum: int = 5, phase: Phase | None = None) -> pd.DataFrame:
        """One row a token of the vocabulary and kind of sublayer, over all blocks.

        Columns: ``token_id``, ``token`` (its text), ``count`` (how often it occurs), ``sublayer``,
        ``executed``. Tokens that occur less than ``minimum`` times are left out; the token that
        executes most stands first.
        """
        chosen = self.of_phase(phase)
        ids, gates = self.token_ids[chosen], self.gates[chosen]
        kinds, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        sums = np.zeros((len(kinds), len(SUBLAYERS)))
        np.add.at(sums, inverse, gates.mean(1))
        executed = sums / counts[:, None]
        order = np.lexsort((kinds, -executed.mean(1)))
        rows = [
            (int(kinds[i]), self.vocabulary[int(kinds[i])], int(counts[i]), kind, executed[i, s])
            for i in order
            if counts[i] >= minimum
            for s, kind in enumerate(SUBLAYERS)
        ]
        return pd.DataFrame(rows, columns=["token_id", "token", "count", "sublayer", "executed"])

    # --- file -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the routes to one safetensors file, all of it or nothing."""
        from safetensors.numpy import save

        from dyndepth.cells.identity import plain
        from dyndepth.common.files import write_atomically

        facts = {name: plain(getattr(self, name)) for name in _ENTRIES}
        facts |= {"layout": LAYOUT, "layers": self.gates.shape[1]}
        tensors: dict[str, np.ndarray] = {
            "gates": np.packbits(self.gates.reshape(-1)),
            "token_ids": self.token_ids.astype(np.int32),
        }
        write_atomically(path_of(path), save(tensors, metadata={"routes": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | Path) -> Routes:
        """Read what ``save`` wrote. Raises UserError if the file is missing or something else."""
        from safetensors import SafetensorError, safe_open

        path = path_of(path)
        if not path.is_file():
            raise UserError(f"no routes at {str(path)!r}; record them by python -m dyndepth.routes")
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["routes"])
                packed, token_ids = file.get_tensor("gates"), file.get_tensor("token_ids")
            if facts["layout"] != LAYOUT:
                raise ValueError(f"its layout is {facts['layout']}, this version reads {LAYOUT}")
            bits = np.unpackbits(packed).astype(bool)
            size = len(token_ids) * facts["layers"] * len(SUBLAYERS)
            if len(packed) != -(-size // 8):
                raise ValueError(f"it holds {len(packed)} bytes of gates, not {-(-size // 8)}")
            return cls(
                gates=bits[:size].reshape(len(token_ids), facts["layers"], len(SUBLAYERS)),
                token_ids=token_ids.astype(np.int64),
                documents=tuple(facts["documents"]),
                lengths=tuple(facts["lengths"]),
                prompt_lengths=tuple(facts["prompt_lengths"]),
                vocabulary={int(token): text for token, text in facts["vocabulary"].items()},
                identity=facts["identity"],
            )
        except KeyError as error:
            raise UserError(f"{str(path)!r} holds no routes (no entry {error})") from error
        except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{str(path)!r} can't be read as routes: {reason}") from error


def record(
    model: Any,
    tokenizer: Any,
    method: DynamicDepthMethod,
    texts: Mapping[str, str | Sequence[int]],
    prompt_length: int | Mapping[str, int] | None = None,
    *,
    length: int | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Routes:
    """Run ``method``, fitted, on ``texts`` (document id -> text, or its token ids) and keep what
    was executed.

    Each document is one forward of the sparse backend, without the LM head. ``prompt_length`` is
    how many tokens of each count as prompt, the same for all or by document id (None: all);
    documents longer than ``length``, or than the model takes, are cut. ``identity`` replaces what
    the method and the model say of themselves.
    Raises UserError for no documents, an empty one, or one with tokens that the model does not
    know.
    """
    parts = list(_executed(model, tokenizer, method, texts, prompt_length, length))
    ids = np.concatenate([ids for ids, _ in parts])
    lengths = tuple(len(ids) for ids, _ in parts)
    prompts = [_prompt(prompt_length, each) for each in texts]
    return Routes(
        gates=np.concatenate([gates for _, gates in parts]),
        token_ids=ids,
        documents=tuple(texts),
        lengths=lengths,
        prompt_lengths=tuple(
            n if prompt is None else min(prompt, n)
            for n, prompt in zip(lengths, prompts, strict=True)
        ),
        vocabulary={token: tokenizer.decode([token]) for token in np.unique(ids).tolist()},
        identity={**(identity or _identity(model, tokenizer, method)), "spec": _spec(method)},
    )


def _executed(
    model: Any,
    tokenizer: Any,
    method: DynamicDepthMethod,
    texts: Mapping[str, str | Sequence[int]],
    prompt_length: int | Mapping[str, int] | None,
    length: int | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids ``[tokens]`` and gates ``[tokens, layers, 2]`` of each document."""
    import torch

    from dyndepth.data.capacity import check_tokens, longest
    from dyndepth.models.blocks import decoder
    from dyndepth.runtime.attach import attach

    if not texts:
        raise UserError("there are no documents to record; give at least one")
    device, most = next(model.parameters()).device, longest(model)
    with torch.no_grad(), attach(model, method) as trace:
        for document, text in texts.items():
            ids = list(_token_ids(tokenizer, text))[:length][:most]
            if not ids:
                raise UserError(f"document {document!r} has no tokens; leave it out")
            check_tokens(model, ids, f"document {document!r}")
            trace.documents = [document]
            trace.prompt_length = _prompt(prompt_length, document)
            decoder(model)(input_ids=torch.tensor([ids], device=device), use_cache=False)
            yield np.array(ids, dtype=np.int64), trace.gates()[0].numpy()


def _token_ids(tokenizer: Any, text: str | Sequence[int]) -> Sequence[int]:
    """Those of a text, or those that are given."""
    return tokenizer([text], verbose=False)["input_ids"][0] if isinstance(text, str) else text


def _prompt(prompt_length: int | Mapping[str, int] | None, document: str) -> int | None:
    """How many of a document's tokens count as prompt; None: all."""
    return prompt_length[document] if isinstance(prompt_length, Mapping) else prompt_length


def _spec(method: DynamicDepthMethod) -> str:
    """The method with those parameters that are not its defaults."""
    own = [f for f in dataclasses.fields(method) if f.repr and f.name not in _COLUMNS]
    given = [f"{f.name}={getattr(method, f.name)}" for f in own]
    changed = [text for f, text in zip(own, given, strict=True) if text != f"{f.name}={f.default}"]
    return f"{method.name}({', '.join(changed)})" if changed else method.name


def _identity(model: Any, tokenizer: Any, method: DynamicDepthMethod) -> dict[str, Any]:
    """What a record without a sweep can say of its origin."""
    from dyndepth.cells.cell import method_identity
    from dyndepth.common.digests import harness_code
    from dyndepth.common.provenance import versions
    from dyndepth.data.tokenizers import tokenizer_fingerprint
    from dyndepth.models.fingerprints import fingerprint

    info = getattr(model, "dyndepth", None)
    return method_identity(method) | {
        "model": info.name if info else "",
        "model_fingerprint": fingerprint(model),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": next(model.parameters()).device.type,
        **versions(),
        "harness_code": harness_code(),
    }
