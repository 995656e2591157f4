"""Calibration and training text: disjoint splits, the same windows every time, clear refusals."""

import json

import pytest
import torch
from conftest import CharacterTokenizer

from dyndepth import assets
from dyndepth.corpus import Corpus, load_corpus
from dyndepth.errors import UserError

TOKENIZER = CharacterTokenizer()


def test_windows_are_reproducible_and_seeded(tiny_corpus):
    first = tiny_corpus.windows(16, 20, seed=3)
    assert first.shape == (20, 16)
    assert first.dtype == torch.int64
    assert torch.equal(first, Corpus(tiny_corpus.texts, TOKENIZER).windows(16, 20, seed=3))
    assert torch.equal(first[:5], tiny_corpus.windows(16, 5, seed=3))
    assert not torch.equal(first, tiny_corpus.windows(16, 20, seed=4))
    assert tiny_corpus.windows(16, 0, seed=3).shape == (0, 16)


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


def test_the_embedded_corpus_holds_nothing_that_is_evaluated_on(corpus):
    assert len(corpus.texts) > 1000
    held = "\n".join(corpus.texts)
    data = assets.asset("data")
    rows = [json.loads(line) for line in (data / "wikipedia.jsonl").read_text().splitlines()]
    mixed = (data / "text_compression.jsonl").read_text().splitlines()
    passages = [row["0"] for row in rows]
    passages += [row["text"] for row in map(json.loads, mixed) if row["type"] == "wikipedia"]
    assert len(passages) == 1050
    assert not [text for text in passages if len(text) > 40 and text in held]


def test_the_embedded_corpus_is_long_enough_for_the_methods(corpus):
    assert corpus.windows(512, 64, 0, "calibration").shape == (64, 512)
    assert corpus.windows(512, 256, 0, "train").shape == (256, 512)
