"""A path that a user gives is expanded once, and means the same in flags, YAML and Python."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from cells import cell
from conftest import CharacterTokenizer, make_tiny
from folders import tiny_folder

from dyndepth.cells.store import Store, same_model
from dyndepth.common.digests import task_files
from dyndepth.common.errors import UserError
from dyndepth.common.paths import check_file, expanded, made_folder, path_of, slug
from dyndepth.common.registry import load_method
from dyndepth.data.corpus import load_corpus
from dyndepth.fitting import fits
from dyndepth.fitting.recovery import adapters
from dyndepth.models.fingerprints import fingerprint
from dyndepth.models.loading import ModelInfo, layer_count, load_model, load_tokenizer
from dyndepth.routes import trace
from dyndepth.sweep import __main__ as sweep
from dyndepth.sweep.progress.json_log import JsonLog
from dyndepth.sweep.settings import PATHS, Settings, read
from dyndepth.tasks import resolve
from dyndepth.verify import stored

TASK = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{a}}"
doc_to_target: " {{b}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A home with models of unusual names, a corpus and a task."""
    home = tiny_folder(tmp_path_factory.mktemp("home"))
    for name in ("org/name", "na me", "\u00e4\u4f60", "sub/deep"):
        shutil.copytree(home / "model", home / name)
    (home / "link").symlink_to(home / "model", target_is_directory=True)
    (home / "tasks").mkdir()
    rows = home / "tasks" / "rows.jsonl"
    rows.write_text('{"a": "one two", "b": "three"}\n{"a": "four", "b": "five"}\n')
    (home / "tasks" / "mine.yaml").write_text(TASK.replace("ROWS", str(rows)))
    return home


@pytest.fixture
def home(made, monkeypatch) -> Path:
    """The same, as the user's home and working folder."""
    monkeypatch.setenv("HOME", str(made))
    monkeypatch.chdir(made)
    return made


def test_only_a_leading_tilde_is_expanded(home):
    assert expanded("~/a b/") == f"{home}/a b/"
    assert path_of("~") == home
    for text in ("embedded", "org/name", "./x", "s3://bucket/~/x", "a~b", "-", "C:\\models\\x"):
        assert expanded(text) == text
    assert expanded(Path("~/a")) == f"{home}/a"


@pytest.mark.parametrize("by", ["flags", "yaml"])
def test_settings_hold_what_the_path_means(by, home):
    given = {"model": "~/model", "corpus": "~/corpus.txt", "include_path": "~/tasks"}
    given |= {"log_json": "~/log.json", "output_path": "~/out"}
    assert set(given) > PATHS
    if by == "yaml":
        (home / "settings.yaml").write_text("".join(f"{k}: {v}\n" for k, v in given.items()))
        words = ["--config", "~/settings.yaml"]
    else:
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
    found = read(words)
    assert {name: str(getattr(found, name)) for name in given} == {
        name: value.replace("~", str(home)) for name, value in given.items()
    }
    assert read(["--model", "~/model"]).output_path == Path("runs/model")


NAMES = ("~/model", "model", "./model", "model/", "sub/../model", "link", "org/name", "na me",
         "\u00e4\u4f60", "~/na me/")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_found_by_whatever_path(name, home):
    model = load_model(name)
    assert model.dyndepth.name == expanded(name)
    assert load_tokenizer(name).vocab_size == 257
    assert layer_count(name) == 4
    wanted = {"ä你": "model", "na me": "na_me"}  # what a file's name takes of it
    last = path_of(name).resolve().name
    assert slug(name) == wanted.get(last, last)
    assert same_model(name, str(path_of(name).resolve()))


def test_a_path_that_is_not_there_is_told_as_it_is_meant(home):
    for call in (load_model, layer_count):
        with pytest.raises(UserError, match=f"no model folder at '{home}/nowhere'"):
            call("~/nowhere")
    with pytest.raises(UserError, match=f"no corpus file at '{home}/nowhere.txt'"):
        load_corpus("~/nowhere.txt", CharacterTokenizer())


def test_python_takes_what_flags_take(home):
    """Corpora, tasks, fits, adapters, routes, runs, manifests and logs."""
    assert load_corpus("~/corpus.txt", CharacterTokenizer()).texts
    assert resolve("mine", "~/tasks") == ["mine"]
    assert task_files("~/tasks") == task_files(str(home / "tasks"))
    model = make_tiny()
    model.dyndepth = ModelInfo("tiny", fingerprint(model), None)
    method = load_method("uls", target_speedup=2.0)
    fits.save_fit(method, model, "~/fit")
    fits.load_fit(load_method("uls", target_speedup=2.0), model, "~/fit")
    assert (home / "fit" / "facts.json").is_file()
    with pytest.raises(UserError, match=f"adapter in '{home}/none'"):
        adapters.read_card("~/none")
    found = trace.Routes(
        torch.ones(2, 4, 2, dtype=torch.bool).numpy(), torch.arange(2).numpy(), ("a",), (2,), (1,),
        {0: "x", 1: "y"},
    )  # fmt: skip
    found.save("~/routes/one.safetensors")
    assert trace.Routes.load("~/routes/one.safetensors").documents == ("a",)
    Store("~/run").write(cell())
    assert len(Store(home / "run").all()) == len(Store("~/run").all()) == 1
    stored.write_manifest("~/run")
    assert stored.read_manifest("~/run") == stored.read_manifest(home / "run")
    log = JsonLog("~/logs/log.json", print)
    log.note("here")
    log.close({})
    assert (home / "logs" / "log.json").is_file()
    assert not os.path.lexists(home / "~")


def test_a_run_by_tilde_is_resumed_by_another_path_and_verified(home, capsys, monkeypatch):
    """Own tasks and an own text are asked for before anything is computed."""
    from dyndepth import rerun
    from dyndepth.verify import __main__ as door

    (home / "settings.yaml").write_text(
        "model: ~/model\ncorpus: ~/corpus.txt\ninclude_path: ~/tasks\ntasks: mine\n"
        "timing: off\noutput_path: ~/swept\nlog_json: ~/swept.json\n"
    )
    assert sweep.main(["--config", "~/settings.yaml"]) == 0
    (made,) = Store("~/swept").all()
    assert made.identity["model"] == f"{home}/model"
    line = "--model model --corpus corpus.txt --include_path tasks --tasks mine --timing off"
    assert sweep.main([*line.split(), "--output_path", "swept/"]) == 0
    assert '"done": 0, "reused": 1' in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("dyndepth.verify.again.again", lambda *_: pytest.fail("it began to compute"))
        for given, flag in (
            ("corpus corpus.txt", "include_path"),
            ("include_path tasks", "corpus"),
        ):
            assert door.main(["~/swept", *f"--{given}".split()]) == 2
            told = capsys.readouterr().err
            assert "this run used " in told
            assert f"of its own ({'data' if flag == 'include_path' else 'corpus'} finger" in told
            assert f": give --{flag}" in told
    words = ["~/swept", "--include_path", "~/tasks", "--corpus", "~/corpus.txt"]
    assert door.main(words) == 0, capsys.readouterr()
    capsys.readouterr()
    assert rerun.main(["~/swept"]) == 0
    assert "--include_path FOLDER_OF_TASK_FILES --corpus FILE_OF_TEXT" in capsys.readouterr().out
    assert not os.path.lexists(home / "~")


def test_what_no_adapter_can_sit_on_is_told_before_the_first_cell(home, monkeypatch, capsys):
    from dyndepth.models import loading

    load = loading.load_model

    def quantised(*args, **kwargs):
        model = load(*args, **kwargs)
        map_ = model.model.layers[1].self_attn.q_proj
        weight = map_.weight.to(torch.int8)
        map_.weight = torch.nn.Parameter(weight, requires_grad=False)
        return model

    monkeypatch.setattr(loading, "load_model", quantised)
    monkeypatch.setattr(loading, "fingerprint", lambda model: "x")
    line = "--model model --corpus corpus.txt --tasks quartz --limit 1 --timing off"
    line += " --recovery none lora(length=32) --output_path refused"
    assert sweep.main(line.split()) == 2
    told = capsys.readouterr().err
    assert "layers.1.self_attn.q_proj is no plain linear map (it is quantised: Linear)" in told
    assert not list((home / "refused").rglob("*.json"))


def test_settings_that_are_paths_are_all_looked_at():
    """Every setting whose help speaks of a path, file or folder is expanded."""
    from dyndepth.common.commands import HELP

    words = ("path", "file to", "folder")
    spoken = {name for name, text in HELP.items() if any(word in text for word in words)}
    # A shard names the output path of others; --config is no setting.
    assert spoken & set(Settings.__dataclass_fields__) - {"shard"} == PATHS | {"output_path"}


def test_what_cannot_be_written_is_said_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a folder; name the CSV to write"):
        check_file("output_path", tmp_path, "CSV")
    with pytest.raises(UserError, match="'.*file' is a file; give a folder"):
        check_file("output_path", tmp_path / "file" / "x.csv", "CSV")
    with pytest.raises(UserError, match="--output_path '/proc/zz' cannot be written"):
        made_folder("output_path", Path("/proc/zz"))
    assert check_file("output_path", tmp_path / "a" / "b" / "x.csv", "CSV").parent.is_dir()
    assert made_folder("output_path", tmp_path / "c" / "d").is_dir()
