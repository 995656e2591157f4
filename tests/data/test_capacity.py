"""What a model cannot take is said before anything is computed, everywhere in the same words."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CharacterTokenizer, make_tiny
from folders import tiny_folder
from reading import letters

from dyndepth.cells.recipe import Recipe
from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method, method_class, methods
from dyndepth.data import capacity
from dyndepth.data.corpus import Corpus
from dyndepth.evaluation.language_model import DyndepthLM
from dyndepth.fitting.recovery.training import recover
from dyndepth.models.families import FAMILIES
from dyndepth.routes.trace import record

SHORT = 32
"""Tokens that the small models take: fewer than any window that a method reads by default."""
ROTARY_AND_LEARNED = ("llama", "gpt2", "opt")


@pytest.fixture(scope="module")
def text() -> Corpus:
    """Enough for hundreds of windows."""
    lines = (" ".join(str(n * k % 97) for k in range(300)) for n in range(60))
    return Corpus([f"Document {n}: {line}" for n, line in enumerate(lines)], CharacterTokenizer())


class Reader(CharacterTokenizer):
    """One that can name its tokens."""

    def decode(self, tokens) -> str:
        return str(tokens)


class Longest:
    """The most tokens that a model's embeddings were given in a row."""

    def __init__(self, model) -> None:
        self.tokens = 0
        model.get_input_embeddings().register_forward_pre_hook(self._look)

    def _look(self, module, args) -> None:
        self.tokens = max(self.tokens, args[0].shape[-1])


# --- how much is much ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_limit_is_that_of_lm_eval(family):
    from lm_eval.models.utils import resolve_max_length

    model = make_tiny(family, max_position_embeddings=SHORT)
    unbounded = 10**9
    wanted = resolve_max_length(model.config, default=unbounded)
    found = capacity.longest(model)
    assert (found or unbounded) == wanted
    assert found == SHORT
    assert capacity.longest(model.config) == found
    assert capacity.fitting(model, 10) == 10
    assert capacity.fitting(model, 10**6) == (found or 10**6)
    assert capacity.embeddings(model) == capacity.embeddings(model.config) == 96


def test_a_model_without_positions_has_no_limit():
    from transformers import BloomConfig

    assert capacity.longest(BloomConfig()) is None
    assert capacity.fitting(BloomConfig(), 10**6) == 10**6
    capacity.check_length(BloomConfig(), 10**6, "it")


class Vocabulary:
    """What tells a tokenizer's size: ``vocab_size`` without, ``len`` with added tokens."""

    def __init__(self, size: int, added: int = 0, eos: int = 2) -> None:
        self.vocab_size, self.added, self.eos_token_id = size, added, eos
        self.bos_token_id = None

    def __len__(self) -> int:
        return self.vocab_size + self.added


def test_a_tokenizer_must_not_be_larger_than_the_model():
    model = make_tiny()
    for fits in (Vocabulary(96), Vocabulary(80), Vocabulary(96, added=4), CharacterTokenizer()):
        capacity.check_vocabulary(model, fits)
        capacity.check_vocabulary(model.config, fits)
    for size in (Vocabulary(97), Vocabulary(96, added=1, eos=96)):
        with pytest.raises(UserError, match="the tokenizer has 97 tokens, the model 96: "):
            capacity.check_vocabulary(model, size)
    capacity.check_tokens(model, [0, 95], "it")
    with pytest.raises(UserError, match="it holds the token 96, and the model has .* 0 to 95"):
        capacity.check_tokens(model, [3, 96], "it")


# --- every method -------------------------------------------------------------------------------


def fitted(name, model, text, **given):
    """The method fitted with its own lengths, but small in everything else."""
    cls = method_class(name)
    small = {key: value for key, value in cls.quick.items() if key not in ("length", "source")}
    speedup = max(1.0, min(1.3, 0.98 * cls().max_speedup(4)))  # a bound, not quite reached
    return load_method(name, target_speedup=speedup, **small, **given).fit(model, text)


@pytest.mark.parametrize("family", ROTARY_AND_LEARNED)
@pytest.mark.parametrize("name", methods())
def test_no_method_reads_windows_that_are_longer_than_the_model(name, family, text):
    """A length in the method's own parameters is refused; one that it chooses is cut."""
    model = make_tiny(family, max_position_embeddings=SHORT)
    seen = Longest(model)
    own = load_method(name).window_length
    if own is None or own <= SHORT:
        fitted(name, model, text)
    else:
        with pytest.raises(UserError, match=f"{own} tokens are too long for this model of {SHORT}"):
            fitted(name, model, text)
        fitted(name, model, text, length=SHORT)
    assert seen.tokens <= SHORT


@pytest.mark.parametrize("criterion", ["angular", "perplexity", "taylor", "greedy", "joint"])
def test_every_criterion_reads_what_fits(criterion, text):
    model = make_tiny("gpt2", max_position_embeddings=SHORT)
    fitted("static_pruning", model, text, criterion=criterion)
    with pytest.raises(UserError, match=f"33 tokens are too long for this model of {SHORT}"):
        fitted("static_pruning", model, text, criterion=criterion, length=33)


def test_a_tokenizer_of_another_model_is_told_by_whoever_reads(text):
    model = make_tiny(vocab_size=40)
    for read in (
        lambda: fitted("early_exit", model, text),
        lambda: fitted("static_pruning", model, text),
        lambda: recover(load_method("dense"), model, text, Recipe(length=16, steps=1)),
    ):
        with pytest.raises(UserError, match="the corpus holds the token .* 0 to 39"):
            read()
    with pytest.raises(UserError, match="document 'a' holds the token"):
        record(model, Reader(), load_method("dense"), {"a": "TEXT"})
    with pytest.raises(UserError, match="the tokenizer has 96 tokens, the model 40"):
        DyndepthLM(model, load_method("dense"), letters())


def test_recovery_and_routes_keep_to_the_model(text):
    model = make_tiny("gpt2", max_position_embeddings=SHORT)
    with pytest.raises(UserError, match="256 tokens are too long for this model of 32"):
        recover(load_method("dense"), model, text, Recipe())
    found = record(model, Reader(), load_method("dense"), {"a": "some text " * 20})
    assert found.lengths == (SHORT,)


def test_a_longer_window_is_refused_where_there_is_no_position():
    for family, fine in (("llama", True), ("bloom", True), ("gpt2", False), ("opt", False)):
        model = make_tiny(family, max_position_embeddings=SHORT)
        tokenizer = letters()
        if fine:
            assert (
                DyndepthLM(model, load_method("dense"), tokenizer, max_length=64).max_length == 64
            )
        else:
            with pytest.raises(UserError, match="max_length: 64 tokens are too long"):
                DyndepthLM(model, load_method("dense"), tokenizer, max_length=64)


# --- every command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders ``model``, ``short`` (64 positions), ``tight`` (24), ``small`` (40
    embeddings), and a ``corpus.txt``."""
    from dyndepth.models.loading import load_model

    folder = tiny_folder(tmp_path_factory.mktemp("capacity"))
    for name, changes in (
        ("short", {"max_position_embeddings": 64}),
        ("tight", {"max_position_embeddings": 24}),
        ("small", {"vocab_size": 40}),
    ):
        shutil.copytree(folder / "model", folder / name)
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    model = load_model(str(folder / "model"))
    model.resize_token_embeddings(40)
    model.save_pretrained(folder / "small")
    return folder


CASES = [
    ("sweep", "--model tight --methods uls", "timing 1 x 64 . 2: 66 tok.* of 24; .*--timing off"),
    ("sweep", "--model short --timing off --methods static_pruning(length=65)",
     "static_pruning: 65 tokens are too long for this model of 64; give length=64"),
    ("sweep", "--model short --timing off --methods layer_controller", "layer_controller: 128 tok"),
    ("sweep", "--timing off --model short --methods random_mask(source=skipgpt(length=999))",
     "random_mask: 999 tokens"),
    ("sweep", "--model short --timing off --recovery lora", "recovery 'lora': 256 tokens"),
    ("sweep", "--model tight --timing off --tasks title_generation --limit 1",
     "task title_generation generates 24 tokens, which leaves no room in the 24"),
    ("sweep", "--model small --timing off --methods uls", "has 257 tokens, the model 'small' 40"),
    ("fit", "skipgpt --model short --length 65", "skipgpt: 65 tokens"),
    ("fit", "uls --model short --recovery lora", "recovery 'lora': 256 tokens"),
    ("fit", "uls --model small", "has 257 tokens, the model 'small' 40"),
    ("timing", "--model tight --method uls", "timing 1 x 64 . 2: 66 tokens"),
    ("timing", "break-even --model short --length 65", "65: 65 tokens .* take fewer"),
    ("timing", "limits --model short", "--tokens: 512 tokens .* of 64"),
    ("importance", "attention --model short --length 65", "--length: 65 tokens"),
    ("importance", "attention --model small", "has 257 tokens, the model 'small' 40"),
    ("routes", "--methods uls --model small --output_path out", "257 tokens, the model 'small'"),
    ("routes", "--methods layer_controller --model short --output_path out", "128 tokens"),
    ("recovered", "--methods uls --model short", "recovery 'lora': 256 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "line", "says"), CASES, ids=[" ".join(c[:2]) for c in CASES])
def test_commands_say_it_in_one_sentence(command, line, says, models, monkeypatch, capfd):
    from dyndepth.__main__ import main

    monkeypatch.chdir(models)
    words = line.split()
    if "--corpus" not in words and command != "timing":
        words += ["--corpus", "corpus.txt"]
    status = main([command, *words])
    told = [row for row in capfd.readouterr().err.splitlines() if row and "it/s" not in row]
    assert status == 2
    assert len(told) == 1
    assert re.search(says, told[0]), told[0]
    assert not list(models.rglob("cells/*.json"))


def test_a_model_that_is_short_is_swept_all_the_same(models, monkeypatch, capfd):
    from dyndepth.sweep.__main__ import main

    monkeypatch.chdir(models)
    line = "--model short --methods static_pruning,early_exit --speedups 1.3 --tasks quartz"
    line += " --limit 2 --timing off --corpus corpus.txt --output_path done"
    assert main(line.split()) == 0, capfd.readouterr()
    shutil.rmtree("done")


def test_a_padded_vocabulary_is_fine(text):
    from dyndepth.models.loading import load_tokenizer

    tokenizer = load_tokenizer("embedded")
    model = make_tiny(vocab_size=49216)
    lm = DyndepthLM(model, load_method("dense"), tokenizer, progress=False)
    pairs = [lm.tok_encode("some text")]
    assert torch.tensor(pairs).max() < 49152
