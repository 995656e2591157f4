"""Prompts in chat templates: conversations are lm-eval's to the token, whoever builds requests."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from conftest import make_tiny
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from reading import CHAT, KINDS, NO_SYSTEM, tokenizer

from dyndepth.common.errors import UserError
from dyndepth.evaluation.chat import Chat, template_of
from dyndepth.evaluation.evaluate import evaluate, quiet_lm_eval, scored_documents
from dyndepth.evaluation.language_model import DyndepthLM
from dyndepth.evaluation.outcomes import outcomes_of
from dyndepth.lm_eval_plugin.model import NamedLM
from dyndepth.methods.dense import Dense

OTHER = "{% for m in messages %}[{{ m['content'] }}]{% endfor %} "
WITH_BOS = "{{ bos_token }}" + CHAT
SYSTEM = "who are you"
SHAPE = """
task: NAME
custom_dataset: !function talk.rows
output_type: OUTPUT
test_split: test
fewshot_split: shots
fewshot_config: {sampler: first_n}
doc_to_text: "question {{text}}"
doc_to_target: TARGET
num_fewshot: SHOTS
metadata: {version: 1.0}
metric_list: [METRIC]
MORE
"""
ROWS = """
from datasets import Dataset

WORDS = "red green blue hello there good day who are you 12 305".split()


def rows(**_):
    made = [
        {
            "text": " ".join(WORDS[(i * k) % 12] for k in range(1, 3 + (5 * i) % 9)),
            "choices": [WORDS[i % 12], "yes no", WORDS[(i + 5) % 12] + "."],
            "label": i % 3,
        }
        for i in range(8)
    ]
    return {"test": Dataset.from_list(made[:5]), "shots": Dataset.from_list(made[5:])}
"""
MEAN = "aggregation: mean, higher_is_better: true"
OUTPUTS = {
    "multiple_choice": ("label", f"{{metric: acc, {MEAN}}}", "doc_to_choice: choices"),
    "loglikelihood": ('"{{choices[label]}}"', f"{{metric: acc, {MEAN}}}", ""),
    "generate_until": (
        '"{{choices[label]}}"',
        f"{{metric: exact_match, {MEAN}}}",
        'generation_kwargs: {until: ["good"], max_gen_toks: 4}',
    ),
    "loglikelihood_rolling": (
        '"{{text}}"',
        "{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}",
        "",
    ),
}
EXTRAS = {
    "plain": "",
    "described": "description: 'hello, answer yes. '",
    "prefixed": "gen_prefix: 'maybe'",
    "both": "description: hello there\ngen_prefix: 'answer: '",
}


@pytest.fixture(autouse=True)
def _no_advice(monkeypatch):
    for name in ("lm_eval", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It describes the machine by running programs, which takes longer than the evaluation.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def model():
    return make_tiny(vocab_size=400, max_position_embeddings=192, bos_token_id=2, eos_token_id=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of every output, with and without examples, a description and a beginning."""
    found = tmp_path_factory.mktemp("tasks")
    (found / "talk.py").write_text(ROWS)
    for output, (target, metric, more) in OUTPUTS.items():
        for extra, line in EXTRAS.items():
            for shots in (0, 2):
                name = f"{output}_{extra}_{shots}"
                text = SHAPE.replace("NAME", name).replace("OUTPUT", output)
                text = text.replace("TARGET", target).replace("METRIC", metric)
                text = text.replace("SHOTS", str(shots)).replace("MORE", f"{more}\n{line}")
                (found / f"{name}.yaml").write_text(text)
    return found


def names(folder, *outputs):
    found = sorted(path.stem for path in folder.glob("*.yaml"))
    return [name for name in found if not outputs or name.startswith(outputs)]


def loaded(folder, some):
    with quiet_lm_eval():
        found = TaskManager(include_path=str(folder), include_defaults=False).load(some)["tasks"]
        for task in found.values():
            task.set_fewshot_seed(seed=1234)
    return found


CHATS = {
    "turns": Chat(True, None, SYSTEM),
    "one text": Chat(True, False, SYSTEM),
    "no system": Chat(True),
    "plain with system": Chat(system_instruction=SYSTEM),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("template", "bos"), [(CHAT, False), (WITH_BOS, True)], ids=["bare", "with BOS"]
)
def test_conversations_are_lm_evals_to_the_token(model, folder, kind, template, bos):
    reads = tokenizer(kind, bos, template=template)
    stock = HFLM(pretrained=model, tokenizer=reads, batch_size=1)
    ours = DyndepthLM(model, Dense(), reads, 1, progress=False)
    tasks, twins = (loaded(folder, names(folder)) for _ in range(2))
    checked = 0
    for chat in CHATS.values():
        ours.converse(chat)
        applied = bool(chat.apply_chat_template)
        for name, task in tasks.items():
            with quiet_lm_eval():
                task.build_all_requests(**chat.building(ours))
                twins[name].build_all_requests(
                    apply_chat_template=applied,
                    fewshot_as_multiturn=bool(chat.fewshot_as_multiturn),
                    system_instruction=chat.system_instruction,
                    chat_template=stock.apply_chat_template if applied else None,
                )
            pairs = list(zip(task.instances, twins[name].instances, strict=True))
            assert [one.args for one, _ in pairs] == [other.args for _, other in pairs]
            if task.OUTPUT_TYPE == "generate_until":
                prompts, _ = ours.prompts(task.instances)
                for prompt, (_, other) in zip(prompts, pairs, strict=True):
                    room = stock.max_length - 4
                    expected, _ = stock.tok_batch_encode([other.args[0]], left_truncate_len=room)
                    assert list(prompt.tokens) == expected[0].tolist()
            elif task.OUTPUT_TYPE == "loglikelihood_rolling":
                assert all("<|" not in one.args[0] for one, _ in pairs)
            else:
                for one, other in pairs:
                    expected = stock._encode_pair(*other.args)
                    if expected[1]:
                        assert ours.pair(one) == expected
                    else:  # a token spans the join, in plain text
                        with pytest.raises(UserError, match="no token of its own"):
                            ours.pair(one)
                contexts = {one.args[0] for one, _ in pairs}
                assert len(contexts) == 5
                assert all(("<|user|>" in context) == applied for context in contexts)
                turns = applied and chat.fewshot_as_multiturn and name.endswith("2")
                assert {text.count("<|user|>") for text in contexts} == {
                    3 if turns else int(applied)
                }
            checked += len(pairs)
    assert checked == 960


def test_choices_share_the_context_of_their_conversation(model, folder):
    reads = tokenizer("metaspace", True, template=CHAT)
    ours = DyndepthLM(model, Dense(), reads, 1, progress=False)
    ours.converse(Chat(True))
    (task,) = loaded(folder, ["multiple_choice_described_2"]).values()
    task.build_all_requests(**ours.chat.building(ours))
    documents = [ours.document(one) for one in task.instances]
    groups, members = ours.groups(documents, [ours.pair(one) for one in task.instances])
    assert len(groups) == 5
    assert all(len(part) == 3 for part in members)


def scored(model, reads, folder, some, **settings):
    return evaluate(
        model, reads, Dense(), some, include_path=folder, batch_size=3, progress=False, **settings
    )


def test_lm_evals_command_line_gives_the_same_numbers(model, folder):
    """By ``hf`` and by ``--model dyndepth``, on tasks of every output."""
    reads = tokenizer("byte-level", template=CHAT)
    settings = {"apply_chat_template": True, "system_instruction": SYSTEM}
    some = names(folder, *(f"{output}_both" for output in OUTPUTS))
    assert len(some) == 8
    own = scored(model, reads, folder, some, **settings)
    plain = scored(model, reads, folder, some)
    values = {(row["task"], row["metric"]): row["value"] for row in own.accuracy}
    for lm in (
        HFLM(pretrained=model, tokenizer=reads, batch_size=1),
        NamedLM(model, Dense(), reads, progress=False),
    ):
        found = simple_evaluate(
            lm,
            tasks=some,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            **settings,
        )
        for (task, metric), value in values.items():
            assert value == pytest.approx(found["results"][task][f"{metric},none"], rel=1e-5)
        for row in own.samples:
            (record,) = (x for x in found["samples"][row["task"]] if x["doc_id"] == row["doc_id"])
            answers = [response for request in record["resps"] for response in request]
            if row["loglikelihoods"] is None:
                assert row["response"] == answers[0]
                continue
            logs = [one if isinstance(one, float) else one[0] for one in answers]
            assert json.loads(row["loglikelihoods"]) == pytest.approx(logs, abs=1e-4)
    for row, other in zip(own.samples, plain.samples, strict=True):
        changed = row["loglikelihoods"] != other["loglikelihoods"]
        if row["loglikelihoods"] is not None:  # a text that is scored whole has no prompt
            assert changed == ("rolling" not in row["task"])


def test_bounds_and_the_checks_of_the_timed_run_see_the_same_conversation(
    model, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))
    reads, name = tokenizer("metaspace", template=CHAT), "multiple_choice_prefixed_2"
    rows = scored(model, reads, folder, name, apply_chat_template=True).samples
    ours = DyndepthLM(model, Dense(), reads, 1, progress=False)
    ours.converse(Chat(True))
    found = scored_documents(rows, ours, None, str(folder))
    (task,) = loaded(folder, [name]).values()
    ours.document_index = {}
    outcomes_of(ours, task, torch.ones(1, 4, 2, dtype=torch.bool))
    asked = task.instances[0]
    assert "<|user|>" in asked.args[0]
    assert [(context, rest) for context, rest, _, _ in found] == [ours.pair(asked)]
    assert found[0][2] == json.loads(rows[0]["loglikelihoods"])[0]


# --- which template -------------------------------------------------------------------------------


def test_the_template_that_is_named_writes(model, folder):
    reads = tokenizer("metaspace", template={"default": CHAT, "brief": OTHER})
    ours = DyndepthLM(model, Dense(), reads, 1, progress=False)
    history = [{"role": "user", "content": "hello"}]
    assert ours.chat_template("brief") == OTHER
    assert ours.apply_chat_template(history) == "[hello] "
    assert ours.chat_template(True) == CHAT
    assert ours.apply_chat_template(history) == "<|user|>hello\n<|assistant|>"
    assert ours.chat_template(False) is None
    name, brief = "loglikelihood_plain_0", tokenizer("metaspace", template=OTHER)
    logs = [
        [row["loglikelihoods"] for row in found.samples]
        for found in (
            scored(model, reads, folder, name, apply_chat_template="brief"),
            scored(model, brief, folder, name, apply_chat_template=True),
            scored(model, reads, folder, name, apply_chat_template=True),
        )
    ]
    assert logs[0] == logs[1] != logs[2]


@pytest.mark.parametrize(
    ("template", "asked", "message"),
    [
        (None, True, "has no chat template, as those of base models have none; leave"),
        (CHAT, "rag", "has no chat template 'rag'; it has default$"),
        ({"rag": CHAT, "tool_use": CHAT}, True, "template 'default'; it has rag, tool_use$"),
    ],
)
def test_a_template_that_is_not_there_is_told_in_a_sentence(
    model, folder, template, asked, message
):
    reads = tokenizer("metaspace", template=template)
    with pytest.raises(UserError, match=message):
        template_of(reads, asked)
    with pytest.raises(UserError, match=message):
        scored(model, reads, folder, "loglikelihood_plain_0", apply_chat_template=asked)
    assert template_of(reads, False) is None


def test_what_a_template_cannot_write_is_told_before_anything_is_scored():
    alternating = "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}x"
    with pytest.raises(UserError, match="can't write a conversation: one at a time; leave --apply"):
        Chat(True).check(tokenizer("metaspace", template=alternating))
    Chat(True, False).check(tokenizer("metaspace", template=alternating))
    silent = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    for template in (NO_SYSTEM + CHAT, silent):
        reads = tokenizer("metaspace", template=template)
        Chat(True).check(reads)
        with pytest.raises(UserError, match="no place for a system instruction; leave --system_i"):
            Chat(True, None, SYSTEM).check(reads)
    Chat(True, None, SYSTEM).check(tokenizer("metaspace", template=CHAT))


def test_few_shot_turns_go_with_a_template_alone():
    assert Chat().settings() == {
        "apply_chat_template": False,
        "fewshot_as_multiturn": False,
        "system_instruction": None,
    }
    assert Chat(True).fewshot_as_multiturn is True
    assert Chat(True, False).fewshot_as_multiturn is False
    with pytest.raises(UserError, match="give --apply_chat_template as well"):
        Chat(False, True)


def test_an_identity_says_how_prompts_were_put():
    one, other = (tokenizer("metaspace", template=text) for text in (CHAT, OTHER))
    assert set(Chat().identity(one).values()) == {""}
    told = Chat(True, None, SYSTEM).identity(one)
    assert told["apply_chat_template"] == "default"
    assert told["fewshot_as_multiturn"] == "yes"
    assert told["system_instruction"] == SYSTEM
    assert len(told["chat_template_fingerprint"]) == 16
    assert (
        told["chat_template_fingerprint"] != Chat(True).identity(other)["chat_template_fingerprint"]
    )
    named = tokenizer("metaspace", template={"default": OTHER, "long": CHAT})
    assert (
        Chat("long").identity(named)["chat_template_fingerprint"]
        == told["chat_template_fingerprint"]
    )
