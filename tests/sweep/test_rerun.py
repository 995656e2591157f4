"""The command of a cell's identity makes the cell: parsed again it gives the very plan."""

from __future__ import annotations

import dataclasses
import shlex
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from cells import cell
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dyndepth import rerun as dyndepth_rerun
from dyndepth.cells.cell import HIDDEN, CellSpec, method_identity
from dyndepth.cells.identity import CHAT, IDENTITY, Row
from dyndepth.cells.store import Store
from dyndepth.common.errors import UserError
from dyndepth.common.paths import EMBEDDED
from dyndepth.common.registry import method_class, methods
from dyndepth.sweep import rerun
from dyndepth.sweep.grid import limits, plans
from dyndepth.sweep.settings import DEFAULT_LIMIT, PLANNING, Settings, chat_of, read
from dyndepth.sweep.workbench import shots

LAYERS = 30
TASKS = ["socialiqa", "quartz", "last_word", "wikipedia_bpb", "title_generation"]


def _identity(plan: CellSpec, **changes: Any) -> Row:
    base: Row = dict.fromkeys(IDENTITY, "x") | dict.fromkeys(CHAT, "")
    base |= {
        "model": EMBEDDED,
        "revision": "wheel==1",
        "dtype": "float32",
        "device": "cpu",
        "attn_implementation": "sdpa",
        "tasks": TASKS,
        "limit": dict.fromkeys(TASKS, 3),
        "sample_seed": 0,
        "num_fewshot": 0,
        "batch_size": 32,
        "recovery": plan.recovery,
    }
    return base | method_identity(plan.build(), plan.recovery) | changes


def _values(hint: Any) -> st.SearchStrategy[Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (Union, types.UnionType):
        return st.one_of([_values(each) for each in inner])
    if hint is str:
        written = "'\"\\,()=- é\n"
        return st.text(st.sampled_from("abN1." + written), min_size=1) | st.sampled_from(
            ["none", "True", "1.5", "inf", "uls(spacing=even)", "--limit"]
        )
    numbers = {
        bool: st.booleans(),
        int: st.integers(0, 9),
        float: st.floats(1e-6, 9.0),
        type(None): st.none(),
    }
    return numbers[hint]


@st.composite
def _plans(draw: Any) -> CellSpec:
    """Any registered method, some of its parameters drawn; those that it refuses are left out."""
    name = draw(st.sampled_from(sorted(methods())))
    cls = method_class(name)
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in HIDDEN]
    reach = cls().max_speedup(LAYERS)
    speedup = draw(st.sampled_from([s for s in (1.0, 1.25, 1.1, 4 / 3) if s <= reach]))
    seed = draw(st.integers(0, 3)) if reach > 1 else 0
    plan = CellSpec(name, speedup, seed)
    if any(f.name == "phases" for f in dataclasses.fields(cls)):
        phases = draw(st.sampled_from(["generation", "both"]))
        plan = dataclasses.replace(plan, parameters={"phases": phases})
    for parameter in draw(st.lists(st.sampled_from(names), unique=True)) if names else []:
        more = plan.parameters | {parameter: draw(_values(hints[parameter]))}
        tried = dataclasses.replace(plan, parameters=more)
        try:
            if tried.build().max_speedup(LAYERS) >= speedup:
                plan = tried
        except UserError:
            pass
    recoveries = ["none", "lora", "lora(rank=2, steps=3, rate=0.0007)", "lora(preset=paper)"]
    if plan.build().speculates:
        recoveries = ["none"]  # all others are refused
    recovery = draw(st.sampled_from(recoveries + ["joint"] * plan.build().needs_training))
    return dataclasses.replace(plan, recovery=read(["--recovery", recovery]).recovery[0])


def _same(identity: Row) -> None:
    """The command as a shell line gives one plan with the identity's keys, and its settings."""
    line = shlex.split(shlex.join(rerun.command(identity)))
    assert line[:3] == ["python", "-m", "dyndepth.sweep"]
    wanted = read(line[3:])
    plan = rerun.plan_of(identity, wanted, LAYERS)
    for key, value in method_identity(plan.build(), plan.recovery).items():
        assert identity[key] == value, key
    assert plan.recovery == identity["recovery"]
    assert len([each for each in plans(wanted, LAYERS) if each.method != "dense"]) <= 1
    for key in ("sample_seed", "batch_size", "dtype", "device"):
        assert getattr(wanted, key) == identity[key]
    assert shots(wanted, {0}) == identity["num_fewshot"]  # the offline tasks say 0
    assert limits(wanted, identity["tasks"]) == identity["limit"]
    asked = {key: identity[key] for key in CHAT if key != "chat_template_fingerprint"}
    assert chat_of(wanted).asked() == asked


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_plans())
def test_every_method_comes_back(plan):
    _same(_identity(plan))


@pytest.mark.parametrize("name", sorted(methods()))
@pytest.mark.parametrize("recovery", ["none", "lora"])
def test_every_method_with_its_defaults(name, recovery):
    """Also that each method is tried for certain, whatever hypothesis draws."""
    reach = method_class(name)().max_speedup(LAYERS)
    speedup = 1.25 if reach > 1 else 1.0
    (recipe,) = read(["--recovery", recovery]).recovery
    plan = CellSpec(name, speedup, recovery=recipe)
    if recovery != "none" and method_class(name).speculates:
        with pytest.raises(UserError, match="leave the method or the recovery out"):
            _same(_identity(plan))
        return
    _same(_identity(plan))


@given(
    limit=st.dictionaries(st.sampled_from(TASKS), st.none() | st.integers(1, 99), min_size=1),
    model=st.sampled_from([EMBEDDED, "org/name", "/a b/model"]),
    batch_size=st.sampled_from([1, 32, 64]),
    num_fewshot=st.integers(0, 2),
    sample_seed=st.integers(0, 2),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    device=st.sampled_from(["cpu", "cuda"]),
    revision=st.sampled_from(["", "main"]),
    chat=st.sampled_from(
        [
            {},
            {"apply_chat_template": "default", "fewshot_as_multiturn": "yes"},
            {"apply_chat_template": "rag", "fewshot_as_multiturn": "no"},
            {"system_instruction": "Answer, 'briefly'.\n- at once"},
        ]
    ),
)
def test_settings_come_back(limit, chat, **changes):
    identity = _identity(CellSpec("dense"), limit=limit, tasks=sorted(limit), **changes, **chat)
    _same(identity)
    wanted = rerun.settings_of(identity)
    assert wanted.model == changes["model"]
    assert wanted.attn_implementation == "sdpa"
    embedded = changes["model"] == EMBEDDED
    assert wanted.revision == (None if embedded else changes["revision"] or None)


def test_the_content_of_a_folder_is_no_revision_to_ask_for():
    from dyndepth.sweep.rerun import revision_of

    assert revision_of({"model": "here/model", "revision": "sha256:0123456789abcdef"}) == ""
    assert revision_of({"model": "org/model", "revision": "main"}) == "main"
    assert revision_of({"model": "embedded", "revision": "wheel==1"}) == ""
    assert revision_of({"model": "org/model", "revision": None}) == ""


def test_what_is_default_is_left_out():
    usual = {task: DEFAULT_LIMIT[EMBEDDED].get(task, 24) for task in TASKS}
    plan = CellSpec("uls", 1.5, 0, {"phases": "both"})
    assert shlex.join(rerun.command(_identity(plan, limit=usual))) == (
        "python -m dyndepth.sweep --methods 'uls(spacing=paper)' --speedups 1.5 --device cpu "
        "--attn_implementation sdpa"
    )
    more = rerun.command(_identity(CellSpec("dense")), output_path="a b", corpus=None)
    assert shlex.join(more[3:]) == (
        "--speedups 1 --limit 3 --device cpu --attn_implementation sdpa --output_path 'a b'"
    )


def test_a_method_that_changed_has_no_plan():
    identity = _identity(CellSpec("uls", 1.5))
    with pytest.raises(UserError, match="no parameter 'nothing'"):
        rerun.plan_of(identity, rerun.settings_of(identity | {"parameters": "nothing=3"}), LAYERS)
    with pytest.raises(UserError, match="has changed since"):
        rerun.plan_of(identity | {"parameters": "nothing=3"}, rerun.settings_of(identity), LAYERS)


def test_few_commands_make_all_cells_and_no_others():
    lora = read(["--recovery", "lora"]).recovery[0]
    both = {"phases": "both"}
    wanted = [CellSpec("dense"), CellSpec("dense", recovery=lora)]
    wanted += [CellSpec("uls", x, 0, both, r) for x in (1.25, 1.5) for r in ("none", lora)]
    wanted += [CellSpec("random_skip", 2.0, seed, both) for seed in (0, 1, 2)]
    wanted += [CellSpec("uls", 2.0, 0, {"spacing": "even", "phases": "generation"})]
    identities = [_identity(plan) for plan in wanted]
    lines = rerun.commands(identities)
    made = {
        (repr(plan.build()), plan.recovery)
        for line in lines
        for plan in plans(read(shlex.split(line)[3:]), LAYERS)
    }
    assert made == {(repr(plan.build()), plan.recovery) for plan in wanted}
    assert len(lines) == 3
    assert rerun.commands([_identity(CellSpec("dense"))]) == [
        "python -m dyndepth.sweep --speedups 1 --limit 3 --device cpu --attn_implementation sdpa"
    ]


def test_command_line(tmp_path, capsys):
    store = Store(tmp_path)
    settled = {"limit": {"one": 4, "two": None}, "git_commit": "abc", "harness_code": "def"}
    usual = {"phases": "both", "dtype": "float32", "device": "cpu", "sample_seed": 0}
    usual |= {"num_fewshot": 0, "batch_size": 32}
    one, two = (
        store.write(cell(method="uls", target_speedup=x, **usual, **settled)) for x in (1.5, 2.0)
    )
    assert dyndepth_rerun.main([str(tmp_path), one.key[:6]]) == 0
    here, about, line = capsys.readouterr().out.splitlines()
    assert here.startswith("# here: git_commit ")
    assert about.startswith(f"# cell {one.key}, made with: git_commit abc, torch x")
    assert about.endswith("harness_code def")
    assert line == (
        "python -m dyndepth.sweep --model tiny --methods uls --speedups 1.5 --tasks one,two "
        "--limit 4,two=none --num_fewshot 0 --device cpu --revision x --output_path runs/again"
    )
    assert dyndepth_rerun.main([str(tmp_path), "--merged"]) == 0
    assert "--speedups 1.5,2 " in capsys.readouterr().out.splitlines()[-1]
    assert dyndepth_rerun.main([str(tmp_path), "zzz"]) == 2
    assert "no cell's hash begins with 'zzz'" in capsys.readouterr().err
    assert dyndepth_rerun.main([str(tmp_path / "nothing")]) == 2
    assert "holds no cells" in capsys.readouterr().err
    assert two.key != one.key


# --- what no identity holds ---------------------------------------------------------------------

OWN_TASKS = {"data_fingerprint": "68f6f65aa709a130+0123456789ab"}
OWN_TEXT = {"corpus_fingerprint": "0123456789abcdef"}


@pytest.mark.parametrize(
    ("changes", "flag", "used"),
    [
        (
            OWN_TASKS,
            "include_path",
            "task files of its own (data fingerprint 68f6f65aa709a130+0123",
        ),
        ({"data_fingerprint": "0123456789ab"}, "include_path", "task files of its own"),
        (OWN_TEXT, "corpus", "a text of its own (corpus fingerprint 0123456789abcdef)"),
    ],
)
def test_what_an_identity_cannot_hold_has_a_placeholder_and_a_sentence(changes, flag, used):
    identity = _identity(CellSpec("dense"), **changes)
    words = rerun.command(identity)
    place = rerun.PLACEHOLDERS[flag]
    assert words[words.index(f"--{flag}") + 1] == place
    assert f"--{flag} {place}" in rerun.commands([identity])[0]
    with pytest.raises(UserError) as fault:
        rerun.settings_of(identity)
    assert used in str(fault.value)
    assert str(fault.value).endswith(f"give --{flag}")
    assert rerun.command(identity, **{flag: "mine"})[-2:] == [f"--{flag}", "mine"]


@pytest.mark.parametrize("text", [None, "2588359b2a4d041a"], ids=["here", "as committed"])
@pytest.mark.parametrize("more", ["", "+gsm8k=0123456789ab,piqa=ba9876543210"])
def test_a_run_of_the_project_s_own_tasks_and_text_needs_nothing(corpus, text, more):
    from dyndepth.data.wheels import data_fingerprint

    own = {
        "data_fingerprint": data_fingerprint("data") + more,
        "corpus_fingerprint": text or corpus.fingerprint,
    }
    assert rerun.missing(_identity(CellSpec("dense"), **own), {}) == []
    assert "--corpus" not in rerun.command(_identity(CellSpec("dense"), **own))


def test_rerun_prints_placeholders_and_says_what_they_stand_for(tmp_path, capsys):
    made = cell(**OWN_TASKS, **OWN_TEXT)
    made.provenance["remote_code"] = True
    Store(tmp_path).write(made)
    assert dyndepth_rerun.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "--include_path FOLDER_OF_TASK_FILES --corpus FILE_OF_TEXT" in printed
    assert "# it used task files of its own (data fingerprint 68f6" in printed
    assert "# it used a text of its own (corpus fingerprint 0123456789abcdef)" in printed
    assert "add --trust_remote_code" in printed


def test_every_setting_is_held_by_an_identity_or_accounted_for():
    """A setting is a flag of ``rerun``, a placeholder, or changes no number of a cell."""
    held = set(rerun._flags(_identity(CellSpec("dense"), **OWN_TASKS, **OWN_TEXT)))
    harmless = {
        "timing",
        "timing_shapes",
        "compiled_dense",
        "mode",
        "resume",
        "output_path",
        "executor",
        "workers",
        "cpus_per_cell",
    }
    harmless |= {"gpus_per_cell", "ray_address", "shard", "cell_timeout", "log_json", "trackers"}
    harmless |= {"dry_run", "debug", "trust_remote_code", *PLANNING}
    assert held | harmless == {each.name for each in dataclasses.fields(Settings)}
    assert not held & harmless
