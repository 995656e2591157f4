"""The command: what it leaves behind, checked again and tampered with; saved methods."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import DEVICE, make_tiny
from exporting import here  # noqa: F401
from folders import tiny_folder
from safetensors.torch import load_file, save_file
from test_recovery import random_adapter
from toys import Toy

import dyndepth
from dyndepth.common import registry
from dyndepth.common.errors import UserError
from dyndepth.export import agreement, check, plain
from dyndepth.export.__main__ import main
from dyndepth.export.record import check_replaceable, hashes
from dyndepth.fitting.recovery.adapters import adapted
from dyndepth.models.loading import load_model
from dyndepth.runtime.attach import attach

pytestmark = pytest.mark.skipif(
    DEVICE.type == "standin", reason="another process has no stand-in to load a model on"
)
TOKENS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of these tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNDEPTH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with ``model`` and ``corpus.txt``."""
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def export(tiny, folder, *words) -> int:
    given = ["--model", str(tiny / "model"), "--corpus", str(tiny / "corpus.txt")]
    return main([*words, *given, "--device", "cpu", "--output_path", str(folder)])


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> Path:
    """A plain checkpoint of a static method, with an adapter that was trained for it."""
    folder = tmp_path_factory.mktemp("exports") / "plain"
    words = ["uls(spacing=even)", "--speedups", "1.3", "--recovery", "lora(steps=2, length=32)"]
    assert export(tiny, folder, *words) == 0
    return folder


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    """The folder of a token rule."""
    folder = tmp_path_factory.mktemp("exports") / "rule"
    assert export(tiny, folder, "--methods", "early_exit", "--speedups", "1.2") == 0
    return folder


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# --- plain checkpoints --------------------------------------------------------------------------


def test_a_stranger_loads_the_checkpoint_and_its_card_says_what_it_is(checkpoint, tiny):
    record = json.loads((checkpoint / "export.json").read_text())
    assert (record["kind"], record["kept"], record["blocks"]) == ("checkpoint", [0, 2, 3], 4)
    assert record["agreement"]["logits"] <= 1e-5
    assert record["measured"]["block_flops_speedup"] == pytest.approx(4 / 3)
    assert not list(checkpoint.parent.glob(".*"))
    card = (checkpoint / "README.md").read_text()
    base = load_model(str(tiny / "model"))
    for each in ("spacing='even'", base.dyndepth.fingerprint, "1.333x", "lora(", "licence", "2404"):
        assert each in card
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        f"m = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r});"
        f"t = AutoTokenizer.from_pretrained({str(checkpoint)!r});"
        "out = m.generate(**t('to be', return_tensors='pt'), max_new_tokens=4, do_sample=False);"
        "print(len(m.model.layers), out.shape[1], 'dyndepth' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PATH": ""},
    )
    assert done.stdout.split() == ["3", "9", "False"], done.stderr


def test_an_export_is_an_ordinary_model_here_too(checkpoint):
    record = json.loads((checkpoint / "export.json").read_text())
    assert load_model(str(checkpoint)).dyndepth.fingerprint == record["fingerprint"]


def test_an_untouched_export_passes_its_check(checkpoint, capsys):
    assert main(["--check", str(checkpoint), "--device", "cpu"]) == 0
    assert last_line(capsys)["check"]["logits_differ_by"] <= 1e-5


def _flipped(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name][0, 0] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _swapped(folder):
    weights = load_file(folder / "model.safetensors")
    own = {k: v for k, v in weights.items() if k.startswith("model.layers.1.")}
    for name, tensor in own.items():
        other = name.replace("layers.1.", "layers.2.")
        weights[name], weights[other] = weights[other], tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _configured(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (folder / "config.json").write_text(json.dumps(config))


def _added(folder):
    save_file({"a": torch.zeros(1)}, folder / "more.safetensors")


def _removed(folder):
    (folder / "tokenizer.json").unlink()


def test_a_scaled_plan_is_no_plain_checkpoint(tiny, tmp_path, capsys):
    """Its blocks go as a whole, and something is left in their place."""
    spec = "uls(spacing=even, scale=token, windows=2, length=32)"
    assert export(tiny, tmp_path / "out", spec, "--speedups", "1.3") == 0
    assert last_line(capsys)["export"]["kind"] == "method"
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert "puts something in the place of what it leaves out" in record["reason"]
    assert record["agreement"]["logits"] <= record["agreement"]["tolerance"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("hidden", [False, True], ids=["as it is", "with its hash"])
@pytest.mark.parametrize("tampered", [_flipped, _swapped, _configured, _added, _removed])
def test_a_tampered_export_is_caught(checkpoint, tmp_path, capsys, tampered, hidden):
    """By the hashes; and where somebody wrote these anew, by what it computes."""
    import shutil

    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    tampered(folder)
    if hidden:
        if tampered in (_added, _removed):
            pytest.skip("nothing that is computed changed")
        record = json.loads((folder / "export.json").read_text())
        record["files"] = hashes(folder)
        (folder / "export.json").write_text(json.dumps(record))
    assert main(["--check", str(folder), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert "is not what was exported" in said
    assert ("differ by" in said) is hidden


@pytest.mark.usefixtures("here")
def test_what_fails_its_check_leaves_nothing_and_an_older_export_stays(
    tiny, tmp_path, monkeypatch, capsys
):
    words = ["uls(spacing=even)", "--speedups", "1.3"]
    right = plain.shortened
    monkeypatch.setattr(plain, "shortened", lambda model, kept: right(model, [*kept[::-1]]))
    assert export(tiny, tmp_path / "out", *words) == 1
    assert "nothing was exported" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(plain, "shortened", right)
    assert export(tiny, tmp_path / "out", *words) == 0
    before = hashes(tmp_path / "out")
    monkeypatch.setattr(plain, "shortened", lambda model, kept: right(model, [*kept[::-1]]))
    assert export(tiny, tmp_path / "out", *words) == 1
    assert hashes(tmp_path / "out") == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["oracle"], "is a bound"),
        ([], "takes one method"),
        (["uls", "--methods", "uls"], "takes one method"),
        (["uls", "--speedups", "1.2,1.3"], "--speedups takes one value"),
        (["uls", "--recovery", "none,lora"], "--recovery takes one value"),
        (["uls", "--speedups", "9"], "out of its reach"),
        (["--check", "nowhere"], "leave output_path out"),
    ],
)
def test_what_cannot_be_exported_is_told_in_a_sentence(tiny, tmp_path, capsys, words, says):
    assert export(tiny, tmp_path / "out", *words) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert export(tiny, tmp_path / "out", "uls") == 2
    assert "something other than an export" in capsys.readouterr().err
    assert main(["--check", str(tmp_path / "out")]) == 2
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def _noted(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "method" / "notes.txt").write_text("mine, too")


def _kept_in_git(folder):
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / "figures").mkdir()


def _card_edited(folder):
    with (folder / "README.md").open("a") as card:
        card.write("It is good at riddles.")


def _fact_edited(folder):
    with (folder / "method" / "facts.json").open("a") as facts:
        facts.write(" ")


def _linked(folder):
    (folder / "thesis").symlink_to(folder.parent)


def _garbled(folder):
    (folder / "export.json").write_text("{}")


@pytest.mark.parametrize(
    ("edited", "named"),
    [
        (_noted, "no export wrote: method/notes.txt and notes.txt; give another --output_path"),
        (_kept_in_git, "wrote: .git/, .gitattributes and figures/; give another"),
        (_card_edited, "wrote: README.md (changed); give another --output_path, or remove or move"),
        (_fact_edited, "method/facts.json (changed)"),
        (_linked, "wrote: thesis; give"),
        (_garbled, "an export whose export.json can't be read; give another --output_path"),
    ],
)
def test_a_second_export_deletes_nothing_of_the_users(saved, tiny, tmp_path, capsys, edited, named):
    import shutil

    folder = shutil.copytree(saved, tmp_path / "copy")
    edited(folder)
    before = _everything(tmp_path)
    assert export(tiny, folder, "early_exit", "--speedups", "1.2") == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert named in sentence
    assert _everything(tmp_path) == before


def test_many_files_of_the_users_are_counted(saved, tmp_path):
    import shutil

    folder = shutil.copytree(saved, tmp_path / "copy")
    check_replaceable(folder)
    for number in range(8):
        (folder / f"note {number}").touch()
    with pytest.raises(UserError, match="note 0, note 1, note 2, note 3, note 4 and 3 more;"):
        check_replaceable(folder)


@pytest.mark.usefixtures("here")
def test_what_comes_into_the_folder_meanwhile_stays(saved, tiny, tmp_path, monkeypatch, capsys):
    """An untouched export is replaced; a file that somebody put there since the start is not."""
    import shutil

    folder = shutil.copytree(saved, tmp_path / "copy")
    words = ["early_exit", "--speedups", "1.3"]
    assert export(tiny, folder, *words) == 0
    assert hashes(folder) != hashes(saved)
    elsewhere = agreement.attached_elsewhere

    def slowly(*given):
        (folder / "notes.txt").write_text("mine")
        return elsewhere(*given)

    monkeypatch.setattr(agreement, "attached_elsewhere", slowly)
    assert export(tiny, folder, *words) == 2
    assert "no export wrote: notes.txt;" in capsys.readouterr().err
    assert (folder / "notes.txt").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["copy"]


def _everything(folder):
    return {
        each: each.read_bytes() if each.is_file() else None for each in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("on_the_path", [False, True])
def test_a_package_of_this_name_in_the_working_folder_is_not_run(
    saved, tmp_path, monkeypatch, on_the_path
):
    (tmp_path / "dyndepth").mkdir()
    (tmp_path / "dyndepth" / "__init__.py").write_text("raise SystemExit('a stranger was run')")
    (tmp_path / "torch.py").write_text("raise SystemExit('another stranger was run')")
    monkeypatch.chdir(tmp_path)
    if on_the_path:
        (tmp_path / "torch.py").unlink()
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = agreement.attached_elsewhere(saved, json.loads((saved / "export.json").read_text()))
    assert set(found) == {"logits", "step_logits", "generated"}


FORGETFUL = """
from dataclasses import dataclass

from dyndepth.method import DynamicDepthMethod


@dataclass(kw_only=True)
class Forgetful(DynamicDepthMethod):
    name, granularity, paper = "forgetful", "token", "test"

    step = None

    def fit(self, model, corpus=None):
        self.facts["kept"], self.step = True, 2  # the second is not saved
        return self

    def gates(self, layer, hidden):
        gate = self.context.positions % self.step == 0
        return gate, True
"""


def test_what_fails_in_a_methods_own_file_elsewhere_is_told_with_its_line(
    tiny, tmp_path, monkeypatch, capsys
):
    about = tmp_path / "forgetful-0.1.dist-info"
    about.mkdir()
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: forgetful\nVersion: 0.1\n")
    entry = "[dyndepth.methods]\nforgetful = forgetful:Forgetful\n"
    (about / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    registry.methods.cache_clear()
    try:
        assert export(tiny, tmp_path / "out", "forgetful", "--speedups", "1.2") == 1
    finally:
        registry.methods.cache_clear()
    said = capsys.readouterr().err
    assert "nothing was exported" in said
    assert "TypeError" in said
    assert "(forgetful.py:18, in gates)" in said
    assert not (tmp_path / "out").exists()


def test_a_check_tells_a_methods_fault_from_the_records(saved, monkeypatch, capsys):
    def failing(*_):
        registry.load_method("early_exit").max_speedup("many")

    monkeypatch.setattr(check, "recomputed", failing)
    assert main(["--check", str(saved), "--device", "cpu"]) == 1
    assert re.search(r"TypeError.*early_exit/rule\.py:\d+, in exits", capsys.readouterr().err)
    monkeypatch.setattr(check, "recomputed", lambda *_: {})
    assert main(["--check", str(saved), "--device", "cpu"]) == 1
    assert "its record can't be compared with" in capsys.readouterr().err


# --- saved methods ------------------------------------------------------------------------------


def logits(model, method):
    with torch.inference_mode(), attach(model, method, prompt_length=5):
        return model(TOKENS).logits


def test_a_rule_is_exported_as_a_folder_that_load_method_takes(saved, tiny, capsys):
    record = json.loads((saved / "export.json").read_text())
    assert (record["kind"], record["model"]) == ("method", None)
    assert "decides by token" in (saved / "README.md").read_text()
    model, method = load_model(str(tiny / "model")), dyndepth.load_method(saved)
    again = registry.load_method("early_exit", target_speedup=1.2, phases="both")
    again.tensors, again.facts = method.tensors, method.facts
    assert repr(method) == repr(again)
    assert torch.equal(logits(model, method), logits(model, again))
    assert main(["--check", str(saved), "--device", "cpu"]) == 0
    facts = json.loads((saved / "method" / "facts.json").read_text())
    facts["facts"] |= {"threshold": 0.999}
    copy = deepcopy(facts)
    try:
        (saved / "method" / "facts.json").write_text(json.dumps(copy))
        assert main(["--check", str(saved), "--device", "cpu"]) == 1
    finally:
        facts["facts"] = method.facts
        (saved / "method" / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def test_a_rule_with_an_adapter_has_its_model_beside_it(tiny, tmp_path):
    words = ["early_exit", "--speedups", "1.2", "--recovery", "lora(steps=2, length=32)"]
    assert export(tiny, tmp_path / "out", *words) == 0
    model, method = load_model(str(tmp_path / "out/model")), dyndepth.load_method(tmp_path / "out")
    logits(model, method)
    with pytest.raises(UserError, match="another model"):
        logits(load_model(str(tiny / "model")), dyndepth.load_method(tmp_path / "out"))


def test_a_saved_method_belongs_to_its_model(tmp_path, tiny_corpus):
    model = make_tiny()
    method = registry.load_method("early_exit", target_speedup=1.2, phases="both")
    method.fit(model, tiny_corpus).save(tmp_path / "rule", model)
    loaded = dyndepth.load_method(str(tmp_path / "rule"))
    assert torch.equal(logits(model, loaded), logits(model, method))
    with pytest.raises(UserError, match="early_exit in .*rule' was fitted on another model"):
        logits(make_tiny(seed=1), loaded)
    with adapted(model, random_adapter(tmp_path / "adapter", model)):
        fresh = dyndepth.load_method(str(tmp_path / "rule"))
        assert torch.equal(logits(model, fresh), logits(model, deepcopy(loaded)))


@pytest.fixture
def toy(monkeypatch):
    """The toy method, installed."""
    entry = registry.EntryPoint("toy", "toys:Toy", registry.GROUP)
    monkeypatch.setattr(registry, "methods", lambda: {"toy": entry})


@pytest.mark.parametrize("inner", ["", "method"])
def test_a_method_of_the_hub_is_brought_at_its_revision(
    tmp_path, tiny_corpus, monkeypatch, toy, inner
):
    Toy(layer=2, label="mine").fit(make_tiny(), tiny_corpus).save(tmp_path / inner, make_tiny())
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision))
        assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    method = dyndepth.load_method("user/rule", revision="a1b2c3")
    assert asked == [("user/rule", "a1b2c3")]
    assert repr(method) == repr(Toy(layer=2, label="mine"))
    assert method.facts["rates"] == [0.25, 1.0]


def test_a_name_of_an_installed_method_wins(tmp_path, monkeypatch, toy):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    assert dyndepth.load_method("toy", layer=3) == Toy(layer=3)
    assert dyndepth.load_method("toy(label='a/b')") == Toy(label="a/b")


def test_what_cannot_be_loaded_is_told_in_a_sentence(tmp_path, tiny_corpus, monkeypatch, toy):
    def told(spec, **how):
        with pytest.raises(UserError) as caught:
            dyndepth.load_method(spec, **how)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "there is no saved method" in told(tmp_path / "empty")
    with pytest.raises(UserError, match="commands take methods by name"):
        registry.parse_methods(f"{tmp_path}/empty")
    assert "no saved method" in told(f"{tmp_path}/absent")
    assert "names an installed method" in told("toy", revision="main")
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "is a model and no method" in told(tmp_path / "empty")
    model = make_tiny()
    Toy().fit(model, tiny_corpus).save(tmp_path / "toy", model)
    assert "leave layer out" in told(tmp_path / "toy", layer=2)
    assert "has no revisions" in told(tmp_path / "toy", revision="main")
    monkeypatch.setattr(Toy, "fit_version", 2)
    assert "fit it again" in told(tmp_path / "toy")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "no network" in told("user/rule")
    monkeypatch.setattr(registry, "methods", dict)
    said = told(tmp_path / "toy")
    assert "'toy', which is not installed" in said
    assert "toys.Toy" in said
    assert "'dyndepth.methods'" in said
    facts = json.loads((tmp_path / "toy" / "facts.json").read_text())
    (tmp_path / "toy" / "facts.json").write_text(json.dumps(facts | {"package": "toybox==1.2"}))
    assert "pip install 'toybox==1.2'" in told(tmp_path / "toy")
