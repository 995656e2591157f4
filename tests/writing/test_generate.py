"""Texts written under any method: the same as by hand, repeatable, in words, and refused."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from folders import tiny_folder
from toys import Drafting

import dyndepth
from dyndepth import attach, load_method, load_model, load_tokenizer
from dyndepth.common.errors import UserError
from dyndepth.plots.shares import by_kind, by_position, kind
from dyndepth.writing import __main__ as door
from dyndepth.writing.generate import generate
from dyndepth.writing.pieces import pieces
from dyndepth.writing.preparation import spec_of
from dyndepth.writing.result import Proposal

PROMPT = "to be or not"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('roles') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose blocks matter to what it writes, and a corpus."""
    from transformers import LlamaForCausalLM

    place = tiny_folder(tmp_path_factory.mktemp("generate"))
    model = LlamaForCausalLM.from_pretrained(place / "model")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.0 if "embed" in name else weight.shape[1] ** -0.5)
    model.save_pretrained(place / "model")
    return place


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder / "model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder / "model"))


def by_hand(model, tokenizer, method, count, **how):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad(), attach(model, method, documents=["prompt/0"]) as trace:
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, pad_token_id=0, **how
        )
    return written[0, ids.shape[1] :].tolist(), trace.totals()


@pytest.mark.parametrize(
    "method",
    [
        load_method("dense"),
        load_method("uls", target_speedup=1.5),
        load_method("random_mask", rates="uniform", target_speedup=1.5, length=32),
        Drafting(),
    ],
    ids=lambda method: method.name,
)
def test_writes_what_the_attached_model_writes(model, tokenizer, method, tiny_corpus):
    found = generate(model, tokenizer, PROMPT, method=method, max_new_tokens=9, corpus=tiny_corpus)
    tokens, totals = by_hand(model, tokenizer, method, 9, do_sample=False)
    assert list(found.tokens) == tokens
    assert found.totals["by_cause"] == totals["by_cause"]
    assert found.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert found.prompt_tokens == len(PROMPT)
    assert found.finish == "limit"
    assert len(found.pieces) == 9
    assert (found.speculation is not None) == method.speculates
    assert json.loads(json.dumps(found.statistics()))["new_tokens"] == 9


def test_drafts_are_told_in_words(model, tokenizer):
    dense = generate(model, tokenizer, PROMPT, max_new_tokens=20)
    found = generate(model, tokenizer, PROMPT, method=Drafting(length=3), max_new_tokens=20)
    assert found.tokens == dense.tokens
    assert found.block_speedup == pytest.approx(1)
    assert found.total_speedup < 1
    assert found.statistics()["drafted"] == sum(len(each.drafted) for each in found.proposals)
    pieces_of = [found.pieces[0]]
    for told, each in zip(found.proposals, found.rounds, strict=True):
        assert len(told.drafted) == len(each.drafted)
        pieces_of += [*told.drafted[: told.written], told.own]
    # A letter in several tokens has its text at the last, so the pieces are compared, not the text.
    assert tuple(each for each in pieces_of if each is not None) == found.pieces
    assert 0 < found.acceptance < 1
    assert found.tokens_per_verification == pytest.approx(19 / len(found.rounds))


def test_accepted_is_one_count_wherever_a_text_ends(model, tokenizer, monkeypatch):
    """The whole model takes all of its own draft; the text ends by the draft's first token."""
    tokens = generate(model, tokenizer, PROMPT, max_new_tokens=8).tokens
    assert tokens[1] != tokens[0]
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokens[1])
    method = Drafting(length=5, without=None)
    found = generate(model, tokenizer, PROMPT, method=method, max_new_tokens=20)
    assert (found.tokens, found.finish) == (tokens[:2], "end")
    ((told,), (each,)) = found.proposals, found.rounds
    assert told.accepted == each.accepted == found.speculation.accepted == 5
    assert (told.written, told.judged, told.own) == (1, 5, None)
    assert found.acceptance == 1


def test_several_texts_are_those_of_each(model, tokenizer):
    method = Drafting()
    both = generate(model, tokenizer, [PROMPT, "question"], method=method, max_new_tokens=8)
    alone = generate(model, tokenizer, PROMPT, method=method, max_new_tokens=8)
    assert [each.tokens for each in both][0] == alone.tokens
    assert [len(each.rounds) for each in both][0] == len(alone.rounds)
    assert both[0].totals == alone.totals
    (only,) = generate(model, tokenizer, ["question"], method=method, max_new_tokens=8)
    assert only.tokens == both[1].tokens


def test_draws_repeat_and_leave_others_alone(model, tokenizer):
    how = {"method": Drafting(), "max_new_tokens": 24, "temperature": 1.5, "top_p": 0.99}
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    first = generate(model, tokenizer, PROMPT, seed=3, **how)
    assert torch.rand(1) == wanted
    assert generate(model, tokenizer, PROMPT, seed=3, **how).tokens == first.tokens
    assert generate(model, tokenizer, PROMPT, seed=4, **how).tokens != first.tokens
    pair = generate(model, tokenizer, [PROMPT, PROMPT], seed=3, **how)
    assert pair[0].tokens == first.tokens != pair[1].tokens


def test_settings_reach_the_search_and_the_models_own_stay(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "temperature", 0.1)
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    greedy, _ = by_hand(model, tokenizer, load_method("dense"), 12, do_sample=False)
    assert list(generate(model, tokenizer, PROMPT, max_new_tokens=12).tokens) == greedy
    one = generate(model, tokenizer, PROMPT, max_new_tokens=12, temperature=9.0, top_k=1)
    assert list(one.tokens) == greedy
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 50.0)
    other, _ = by_hand(model, tokenizer, load_method("dense"), 12, do_sample=False)
    found = generate(model, tokenizer, PROMPT, method=Drafting(), max_new_tokens=12)
    assert list(found.tokens) == other != greedy
    monkeypatch.setattr(model.generation_config, "eos_token_id", other[4])
    found = generate(model, tokenizer, PROMPT, method=Drafting(), max_new_tokens=12)
    assert list(found.tokens) == other[:5]
    assert found.finish == "end"


@pytest.mark.parametrize("method", [load_method("dense"), Drafting()], ids=lambda m: m.name)
def test_stops_before_a_text(model, tokenizer, method):
    whole = generate(model, tokenizer, PROMPT, method=method, max_new_tokens=40)
    place = next(i for i in range(5, 40) if "�" not in whole.text[i : i + 2])
    stop = whole.text[place : place + 2]
    found = generate(
        model, tokenizer, PROMPT, method=method, max_new_tokens=40, stop=["nowhere", stop]
    )
    assert found.text == whole.text[: whole.text.index(stop)]
    assert found.finish == "stop"
    assert len(found.tokens) < 40
    assert whole.tokens[: len(found.tokens)] == found.tokens


def test_a_conversation_is_put_into_the_template(model, tokenizer, monkeypatch):
    messages = [{"role": "user", "content": "be"}]
    with pytest.raises(UserError, match="no chat template"):
        generate(model, tokenizer, messages)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    found = generate(model, tokenizer, messages, max_new_tokens=5)
    assert (
        found.tokens == generate(model, tokenizer, "<user>be<assistant>", max_new_tokens=5).tokens
    )
    two = generate(model, tokenizer, [messages, messages], max_new_tokens=5)
    assert [each.tokens for each in two] == [found.tokens] * 2
    with pytest.raises(UserError, match="does not take these messages.*roles"):
        generate(model, tokenizer, [{"role": "judge", "content": "be"}])


def test_a_method_is_fitted_where_it_needs_to_be(model, tokenizer, folder, tmp_path, monkeypatch):
    from dyndepth.data.corpus import load_corpus

    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))
    corpus = load_corpus(folder / "corpus.txt", tokenizer)
    spec = "static_pruning(target_speedup=1.3, windows=2, length=32)"
    first = generate(model, tokenizer, PROMPT, method=spec, corpus=corpus, max_new_tokens=4)
    assert len(list((tmp_path / "fits" / "static_pruning").glob("*/facts.json"))) == 1
    method = load_method(spec)
    again = generate(model, tokenizer, PROMPT, method=method, corpus=corpus, max_new_tokens=4)
    assert again.tokens == first.tokens
    assert method.fitted
    assert load_method(first.method) == load_method(spec)
    assert first.block_speedup > 1.1


@pytest.mark.parametrize(
    ("prompt", "how", "says"),
    [
        ("", {}, "the prompt has no tokens; give at least one word"),
        (["a", ""], {}, "prompt 1 has no tokens"),
        ([], {}, "a prompt is a text, a list of messages"),
        (7, {}, "a prompt is a text"),
        ([["a", "b"], ["c"]], {}, "prompt 0 is a list of 2 prompts"),
        (["a", 7], {}, "a prompt is a text"),
        ("a", {"seed": 2**64}, "seed takes a whole number below"),
        ("a", {"corpus": 3, "method": "adaskip(target_speedup=1.5)"}, "corpus takes what load"),
        ("a", {"corpus": "no/such", "method": "adaskip(target_speedup=1.5)"}, "no/such"),
        ("a", {"max_new_tokens": 2048}, "1 tokens, which leaves no room for 2048 more in the 2048"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens takes a whole number of at least 1, not 0"),
        ("a", {"temperature": -1}, "temperature takes a number of at least 0"),
        ("a", {"temperature": float("nan")}, "temperature takes a number"),
        ("a", {"top_p": 0.9}, "top_p is of drawn tokens"),
        ("a", {"top_k": -1, "temperature": 1}, "top_k takes a whole number"),
        ("a", {"top_p": 2, "temperature": 1}, "top_p takes a number above 0"),
        ("a", {"stop": ""}, "stop takes texts that are not empty"),
        ("a", {"stop": 3}, "stop takes a text or several"),
        ("a", {"seed": 1.5}, "seed takes a whole number"),
        ("a", {"method": "ulss"}, "did you mean uls"),
        ("a", {"method": 3}, "method takes a method or the name of one, not 3"),
        ("a", {"method": "oracle"}, "chooses plans by the outcomes of the documents"),
        ("a", {"method": "d_llm(target_speedup=1.5)"}, "d_llm has not been trained on this model"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(model, tokenizer, prompt, how, says, tiny_corpus):
    with pytest.raises(UserError, match=says) as caught:
        generate(model, tokenizer, prompt, **{"corpus": tiny_corpus} | how)
    assert "\n" not in str(caught.value)


NAMES = """
import inspect, sys
import dyndepth
from dyndepth.__main__ import main
if sys.argv[1] == "function":
    assert callable(dyndepth.generate)
assert main(["generate"]) == 2  # there is no prompt
from dyndepth import generate
import dyndepth.writing.result as result
try:
    import dyndepth.generate
except ImportError as error:
    assert "from dyndepth import generate" in str(error)
from dyndepth import generate as again
assert generate is again is dyndepth.generate
assert "method" in inspect.signature(generate).parameters
"""


@pytest.mark.parametrize("first", ["function", "door"])
def test_the_name_is_the_function_whatever_came_first(first):
    command = [sys.executable, "-c", NAMES, first]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_function_and_texts_can_be_copied(model, tokenizer):
    found = generate(model, tokenizer, PROMPT, method=Drafting(), max_new_tokens=3)
    assert ForkingPickler.loads(ForkingPickler.dumps(found)) == found
    assert ForkingPickler.loads(ForkingPickler.dumps(dyndepth.generate)) is generate
    assert copy.deepcopy(found) == found


class TestPieces:
    def test_are_what_each_token_adds(self, tokenizer):
        ids = tokenizer("né a")["input_ids"]
        assert pieces(tokenizer, (), ids) == ("n", "�", "é", " ", "a")
        assert pieces(tokenizer, ids[:2], ids[2:]) == ("é", " ", "a")

    def test_a_tokenizer_that_takes_leading_spaces_off(self):
        class Words:
            def decode(self, tokens, **_):
                return " ".join("ab"[token] for token in tokens)

        assert pieces(Words(), (), [0, 1]) == ("a", " b")
        assert pieces(Words(), [0], [1]) == (" b",)

    @pytest.mark.parametrize(
        ("piece", "named"),
        [
            (" the", "word start"), ("The", "word start"), ("ing", "word inside"),
            ("語", "word inside"), (" don't", "word start"), ("2", "number"),
            (" 1,000", "number"),
            ("-", "punctuation"), (" (", "punctuation"), ("_", "punctuation"),
            ("\n\n", "white space"),
            (" ", "white space"), ("", "other"), ("�", "other"), (" x2", "word start"),
        ],
    )  # fmt: skip
    def test_kinds(self, piece, named):
        assert kind(piece) == named


def test_spec_names_the_method_again():
    masks = "random_mask(target_speedup=2.0, source=static_pruning(criterion=greedy))"
    for spec in ("dense", "uls(target_speedup=1.25, spacing=even)", masks):
        assert spec_of(load_method(spec)) == spec


def test_shares_count_what_was_judged(model, tokenizer):
    from dataclasses import replace

    text = generate(model, tokenizer, PROMPT, method=Drafting(), max_new_tokens=4)
    told = (
        Proposal((" a", "b", "1", "."), 2, " x"),  # judged: " a", "b", "1"
        Proposal((" a", "b"), 2, "."),
        Proposal((), 0, "."),
        Proposal(("2",), 0, "."),
        Proposal(("3", "x"), 2, None, unwritten=1),  # the text ended after "3"
    )
    text = replace(text, proposals=told)
    table = by_position([text]).set_index("position")
    assert table["judged"].to_dict() == {1: 4, 2: 3, 3: 1}
    assert table["accepted"].to_dict() == {1: 3, 2: 3, 3: 0}
    table = by_kind(text).set_index("kind")
    assert table["judged"].to_dict() == {"word start": 2, "word inside": 3, "number": 3}
    assert table["accepted"].to_dict() == {"word start": 2, "word inside": 3, "number": 1}
    # Wilson's interval by its own formula, 2 of 2.
    z2 = 1.959964**2
    assert table.loc["word start", "low"] == pytest.approx(2 / (2 + z2), abs=1e-6)
    assert table.loc["word start", "high"] == pytest.approx(1)


class TestCommand:
    @pytest.fixture
    def command(self, folder, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def call(*words: str):
            common = ("--model", str(folder / "model"), "--corpus", str(folder / "corpus.txt"))
            status = door.main([*words, *common, "--max_new_tokens", "12"])
            printed = capsys.readouterr()
            return status, printed.out, printed.err

        return call

    def test_prints_the_text_and_on_stderr_what_it_took(self, command, model, tokenizer):
        status, out, err = command(PROMPT, "--methods", "uls", "--speedups", "1.5")
        assert status == 0
        wanted = generate(
            model, tokenizer, PROMPT, method="uls(target_speedup=1.5)", max_new_tokens=12
        )
        assert out == f"{wanted.text}\n"
        lines = err.splitlines()
        assert "uls(target_speedup=1.5)" in lines
        assert any("12 tokens after 12, in " in line for line in lines)
        assert f"{wanted.block_speedup:.2f} of the blocks" in err
        assert max(map(len, lines)) <= 80

    def test_json_is_one_document(self, command):
        status, out, err = command(PROMPT, "--json", "--compare")
        found = json.loads(out)["generate"]
        assert status == 0
        assert "tokens after" not in err
        assert found["compared"]["equal"] is True
        assert found["compared"]["rough"]["pairs"] == 3
        assert found["compared"]["dense_text"] == found["text"]

    def test_compared_with_dense(self, command, monkeypatch):
        monkeypatch.setattr(door, "_method", lambda options: Drafting())
        status, out, err = command(PROMPT, "--compare", "--plot", "a.svg")
        assert status == 0
        assert "dense writes the same text, to the last token" in err
        assert "rough time, 3 interleaved pairs" in err
        assert "tokens each" in err
        assert "written: a.svg" in err
        assert max(map(len, err.splitlines())) <= 80
        monkeypatch.setattr(door, "_method", lambda options: load_method("uls", target_speedup=2))
        _, _, err = command("question", "--compare")
        assert "dense writes another text, after" in err
        assert re.search(r"after (1 token that is|\d+ tokens that are) the same\n", err)
        assert "\n\ndense's text:\n" in err

    def test_a_draft_of_the_whole_model_is_told(self, command):
        status, out, err = command(PROMPT, "--methods", "self_speculation(draft=uls)")
        assert status == 0
        told = [line for line in err.splitlines() if line.startswith("dyndepth.generate: ")]
        assert len(told) == 1
        assert "target speedup above 1" in told[0]

    def test_refuses_what_python_refuses(self, command):
        status, out, err = command(PROMPT, "--methods", "oracle")
        assert (status, out) == (2, "")
        assert "oracle chooses plans by the outcomes" in err

    def test_reads_standard_input_and_streams_to_a_terminal(self, command, monkeypatch):
        import io
        import sys

        monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
        _, piped, _ = command("-")
        monkeypatch.setattr(door, "_streams", lambda options: True)
        _, streamed, _ = command(PROMPT)
        assert streamed == piped

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ([], "PROMPT"),
            (["a", "--plot", "a.gif"], "--plot takes a file that ends in"),
            (["a", "--plot", "a.png"], "dense makes none"),
            (["a", "--temperature", "-1"], "--temperature takes a number of at least 0"),
            (["a", "--top_p", "0.5"], "top_p is of drawn tokens"),
            (["a", "--chat"], "no chat template"),
        ],
    )
    def test_wrong_input_gets_one_sentence(self, command, words, says):
        status, out, err = command(*words)
        assert (status, out) == (2, "")
        assert says in err
        assert err.count("\n") == 1
