"""Calibration and training text: disjoint splits, the same windows every time, clear refusals."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CharacterTokenizer

from dyndepth.common.errors import UserError
from dyndepth.data import wheels
from dyndepth.data.corpus import EMBEDDED_TEXT, Corpus, load_corpus

TOKENIZER = CharacterTokenizer()


def test_windows_are_reproducible_and_seeded(tiny_corpus):
    first = tiny_corpus.windows(16, 20, seed=3)
    assert first.shape == (20, 16)
    assert first.dtype == torch.int64
    assert torch.equal(first, Corpus(tiny_corpus.texts, TOKENIZER).windows(16, 20, seed=3))
    assert torch.equal(first[:5], tiny_corpus.windows(16, 5, seed=3))
    assert not torch.equal(first, tiny_corpus.windows(16, 20, seed=4))


def test_windows_of_a_round_do_not_overlap():
    letters = [chr(3 + 40 * n + k) for n in range(2) for k in range(40)]
    corpus = Corpus(["".join(letters[:40]), "".join(letters[40:])], TOKENIZER)
    windows = corpus.windows(5, 8, seed=0)
    assert windows[windows != TOKENIZER.eos_token_id].unique(return_counts=True)[1].max() == 1


def test_documents_are_closed_by_the_end_of_sequence(tiny_corpus):
    stream = tiny_corpus._streams["train"]
    documents = tiny_corpus.documents("train")
    assert (stream == TOKENIZER.eos_token_id).sum() == len(documents)
    assert len(stream) == sum(len(text) + 1 for text in documents)


def test_splits_share_no_document_and_leave_none_out(tiny_corpus):
    train, calibration = tiny_corpus.documents("train"), tiny_corpus.documents("calibration")
    assert not set(train) & set(calibration)
    assert sorted(train + calibration) == sorted(tiny_corpus.texts)
    assert len(calibration) == len(tiny_corpus.texts) // 4


def test_order_and_duplicates_do_not_matter(tiny_corpus):
    doubled = Corpus([*reversed(tiny_corpus.texts), *tiny_corpus.texts], TOKENIZER)
    assert doubled.fingerprint == tiny_corpus.fingerprint
    assert torch.equal(doubled.windows(16, 9, 0), tiny_corpus.windows(16, 9, 0))
    assert Corpus(tiny_corpus.texts[1:], TOKENIZER).fingerprint != tiny_corpus.fingerprint


def test_training_starts_over_and_calibration_does_not(tiny_corpus):
    held = len(tiny_corpus._streams["calibration"]) // 64
    assert len(tiny_corpus.windows(64, held, 0, "calibration")) == held
    with pytest.raises(UserError, match="too short: its calibration split has .* give more text"):
        tiny_corpus.windows(64, held + 1, 0, "calibration")
    trained = len(tiny_corpus._streams["train"]) // 64
    assert len(tiny_corpus.windows(64, 3 * trained, 0)) == 3 * trained
    with pytest.raises(UserError, match="too short: its train split"):
        tiny_corpus.windows(10**6, 1, 0)


def test_own_text_is_read_from_txt_and_jsonl(tmp_path):
    texts = ["The first document.", "The second,\non two lines.", "The third: ä."]
    (tmp_path / "own.txt").write_text("\n\n".join(texts), encoding="utf-8")
    lines = [json.dumps({"text": texts[0]}), json.dumps(texts[1]), "", json.dumps(texts[2])]
    (tmp_path / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name in ("own.txt", "own.jsonl"):
        assert sorted(load_corpus(tmp_path / name, TOKENIZER).texts) == sorted(texts)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("own.jsonl", b'{"text": "a"}\n{"tex": "b"}', "entry 2 of .* is no text"),
        ("own.jsonl", b'{"text": "a"}\n3', "entry 2 of .* is no text"),
        ("own.jsonl", b"plain text", "is not JSON lines"),
        ("own.txt", b"one document", "holds 1 different documents; at least 2"),
        ("own.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("own.csv", b"a,b", "neither a .txt nor a .jsonl"),
        ("own.txt", None, "no corpus file at"),
    ],
)
def test_wrong_files_are_told_in_one_sentence(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_corpus(tmp_path / name, TOKENIZER)


TEXTS = ["Ein Satz.\nUnd noch einer: \u00e4.", "A second\u2028text.", "The third,\n\nin parts."]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_file_is_the_same_corpus_wherever_it_was_written(tmp_path, kind, end, encoding):
    plain, other = tmp_path / f"plain.{kind}", tmp_path / f"other.{kind}"
    rows = (json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS)
    content = "\n\n".join(TEXTS) if kind == "txt" else "\n".join(rows)
    plain.write_bytes(content.encode())
    other.write_bytes(content.replace("\n", end).encode(encoding))
    wanted, found = load_corpus(plain, TOKENIZER), load_corpus(other, TOKENIZER)
    assert (found.texts, found.fingerprint) == (wanted.texts, wanted.fingerprint)
    assert len(found.texts) == (4 if kind == "txt" else 3)


def test_the_fingerprint_of_a_plain_file_is_known(tmp_path):
    """Of texts with single, double and triple line ends: another reading of them shows here."""
    (tmp_path / "own.txt").write_bytes(b"one\ntwo\n\nthree\n\n\nfour \n\n  five\n")
    found = load_corpus(tmp_path / "own.txt", TOKENIZER)
    assert sorted(found.texts) == ["\nfour ", "  five\n", "one\ntwo", "three"]
    assert found.fingerprint == "262a91d35647b856"


def test_a_line_of_white_space_alone_separates_documents(tmp_path):
    for blank in (" ", "\t", "  \t ", "\u00a0", " \r"):
        (tmp_path / "own.txt").write_bytes(f"one\n{blank}\ntwo\n".encode())
        texts = load_corpus(tmp_path / "own.txt", TOKENIZER).texts
        assert sorted(text.strip() for text in texts) == ["one", "two"], repr(blank)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_another_encoding_is_named(tmp_path, kind, encoding):
    file = tmp_path / f"own.{kind}"
    file.write_bytes("one\n\ntwo".encode(encoding))
    with pytest.raises(UserError, match="own.*is not UTF-8 text but UTF-16; save it as UTF-8"):
        load_corpus(file, TOKENIZER)
    file.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match="is not UTF-8 text: byte 3 is 0xe9"):
        load_corpus(file, TOKENIZER)


def test_every_text_file_of_a_user_is_read_alike(tmp_path):
    """Settings, texts to record, published tables, curves, fits' and adapters' JSON, manifests."""
    from dyndepth.common import files
    from dyndepth.fitting import fits
    from dyndepth.fitting.recovery import adapters
    from dyndepth.results import numbers, published
    from dyndepth.routes.recorded import documents
    from dyndepth.sweep.settings import read_config
    from dyndepth.verify import stored

    def written(name, text):
        path = tmp_path / name
        path.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
        return path

    assert read_config(written("a.yaml", "model: here\nseed: 3\n")) == {"model": "here", "seed": 3}
    found = documents(str(written("a.txt", "one\n \ntwo\n")), 9)
    assert list(found.values()) == ["one", "two"]
    written("published.csv", ",".join(published.COLUMNS) + "\n")
    assert published.parse(files.read_text(tmp_path / "published.csv"), "here") == []
    assert numbers.read(written("a.csv", "cell,value\n1,2\n")) == [{"cell": "1", "value": "2"}]
    assert fits.read_curve(written("curve.csv", "step,loss\n1,2.5\n")) == [{"loss": 2.5}]
    card = dict.fromkeys(adapters._CARD_KEYS, "x") | {"layout": adapters._LAYOUT}
    written(adapters.CARD, json.dumps(card))
    assert adapters.read_card(tmp_path) == card
    written(stored.NAME, json.dumps({"format": stored.FORMAT, "cells": {}}))
    assert stored.read_manifest(tmp_path) == stored.Manifest({}, ())
    for name, read in (("a.yaml", read_config), ("a.txt", lambda file: documents(str(file), 9))):
        (tmp_path / name).write_text("a: b", encoding="utf-16")
        with pytest.raises(UserError, match=f"{name} is not UTF-8 text but UTF-16"):
            read(tmp_path / name)


def test_the_embedded_corpus_holds_nothing_that_is_evaluated_on(corpus):
    assert len(corpus.texts) > 1000
    held = "\n".join(corpus.texts)
    data = wheels.asset("data")
    rows = [json.loads(line) for line in (data / "wikipedia.jsonl").read_text().splitlines()]
    mixed = (data / "text_compression.jsonl").read_text().splitlines()
    passages = [row["0"] for row in rows]
    passages += [row["text"] for row in map(json.loads, mixed) if row["type"] == "wikipedia"]
    assert len(passages) == 1050
    assert not [text for text in passages if len(text) > 40 and text in held]


def test_the_embedded_corpus_is_long_enough_for_the_methods(corpus):
    assert corpus.windows(512, 64, 0, "calibration").shape == (64, 512)
    assert corpus.windows(512, 256, 0, "train").shape == (256, 512)


def test_the_embedded_corpus_is_known_by_its_fingerprint(corpus):
    assert corpus.fingerprint == EMBEDDED_TEXT


@pytest.mark.parametrize(("length", "count"), [(0, 4), (8, 0), (-1, 2)])
def test_windows_without_text_are_refused(tiny_corpus, length, count):
    with pytest.raises(UserError, match="hold no text; give at least one of each"):
        tiny_corpus.windows(length, count, seed=0)
