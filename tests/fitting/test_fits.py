"""A fit is made once, comes back unchanged, and is refused where it does not belong."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toys import Toy

from dyndepth.common.errors import UserError
from dyndepth.fitting import fits
from dyndepth.fitting.fits import fit_cached, fit_key, load_fit, save_fit


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Toy, "fits", 0)
    return tmp_path / "cache"


def assert_same_fit(first: Toy, second: Toy) -> None:
    assert first.facts == second.facts
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert tensor.dtype == second.tensors[name].dtype
        assert torch.equal(tensor, second.tensors[name])


def test_a_fit_is_made_once_and_comes_back_unchanged(tiny, tiny_corpus):
    model = tiny()
    fresh = fit_cached(Toy(layer=2), model, tiny_corpus)
    kept = fit_cached(Toy(layer=2), model, tiny_corpus)
    assert Toy.fits == 1
    assert_same_fit(fresh, kept)
    again = fit_cached(Toy(layer=2), model, tiny_corpus, refresh=True)
    assert Toy.fits == 2
    assert_same_fit(fresh, again)


def test_whatever_decides_the_fit_changes_its_address(tiny, tiny_corpus, monkeypatch):
    model = tiny()
    keys = [
        fit_key(Toy(), model, tiny_corpus),
        fit_key(Toy(), model, None),
        fit_key(Toy(threshold=0.6), model, tiny_corpus),
        fit_key(Toy(target_speedup=1.5), model, tiny_corpus),
        fit_key(Toy(seed=1), model, tiny_corpus),
        fit_key(Toy(), tiny(seed=1), tiny_corpus),
        fit_key(Toy(), tiny().to(torch.bfloat16), tiny_corpus),
    ]
    monkeypatch.setattr(Toy, "fit_version", 2)
    keys.append(fit_key(Toy(), model, tiny_corpus))
    assert len(set(keys)) == len(keys)


def test_a_fit_draws_the_same_whatever_was_drawn_before(tiny, tiny_corpus, monkeypatch):
    drawn = []
    monkeypatch.setattr(Toy, "fit", lambda self, *_: drawn.append(torch.rand(3)) or self)
    for seed in (5, 6):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        fit_cached(Toy(seed=3), tiny(), tiny_corpus, refresh=True)
        assert torch.equal(torch.get_rng_state(), before)
    assert len(drawn) == 2
    assert torch.equal(*drawn)


def test_values_that_bfloat16_does_not_tell_apart_are_fitted_apart(tiny):
    from dyndepth.models.fingerprints import fingerprint

    model, same, other = tiny(), tiny(), tiny()
    for each, value in ((model, 1.0), (same, 1.0), (other, 1.003)):
        each.model.norm.weight.data.fill_(value)
    assert fingerprint(model) == fingerprint(other)
    assert fit_key(Toy(), model, None) == fit_key(Toy(), same, None)
    assert fit_key(Toy(), model, None) != fit_key(Toy(), other, None)


def test_a_fit_from_before_digests_were_as_today_is_taken(tiny, tmp_path, monkeypatch):
    from dyndepth.cells import identity
    from dyndepth.models import fingerprints

    model = tiny()
    save_fit(Toy().fit(model, None), model, tmp_path / "fit")
    file = tmp_path / "fit" / "facts.json"
    now = fingerprints.fingerprint(model)
    file.write_text(file.read_text().replace(now, "0123456789abcdef"))
    with pytest.raises(UserError, match="another model"):
        load_fit(Toy(), model, tmp_path / "fit")
    monkeypatch.setitem(identity.FORMER, "0123456789abcdef", now)
    assert load_fit(Toy(), model, tmp_path / "fit").facts
    file.write_text(file.read_text().replace('"0123456789abcdef"', '["0123456789abcdef"]'))
    with pytest.raises(UserError, match="another model"):
        load_fit(Toy(), model, tmp_path / "fit")


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "delete"])
def test_a_garbled_cached_fit_is_made_again(tiny, tiny_corpus, own_cache, name, harm):
    model = tiny()
    fresh = fit_cached(Toy(), model, tiny_corpus)
    (file,) = own_cache.rglob(name)
    damage(file, harm)
    kept = fit_cached(Toy(), model, tiny_corpus)
    assert Toy.fits == 2
    assert_same_fit(fresh, kept)
    fit_cached(Toy(), model, tiny_corpus)
    assert Toy.fits == 2


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "delete"])
def test_a_garbled_saved_fit_is_refused(tiny, tmp_path, name, harm):
    model = tiny()
    save_fit(Toy().fit(model), model, tmp_path / "fit")
    damage(tmp_path / "fit" / name, harm)
    with pytest.raises(UserError, match=r"the fit in .* can't be read \(.*fit again") as caught:
        load_fit(Toy(), model, tmp_path / "fit")
    assert "\n" not in str(caught.value)


def damage(file, harm: str) -> None:
    content = file.read_bytes()
    if harm == "delete":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 0xFF]) + content[-2:])


def test_a_fit_is_refused_where_it_does_not_belong(tiny, tmp_path, monkeypatch):
    model, path = tiny(), tmp_path / "fit"
    save_fit(Toy(layer=1).fit(model), model, path)
    assert load_fit(Toy(layer=1), model, path).facts["layer"] == 1
    with pytest.raises(UserError, match="was made for another model"):
        load_fit(Toy(layer=1), tiny(seed=1), path)
    with pytest.raises(UserError, match="another parameter layer"):
        load_fit(Toy(layer=2), model, path)
    with pytest.raises(UserError, match="another parameter target_speedup"):
        load_fit(Toy(layer=1, target_speedup=2.0), model, path)
    monkeypatch.setattr(Toy, "fit_version", 2)
    with pytest.raises(UserError, match="another fit version"):
        load_fit(Toy(layer=1), model, path)
    monkeypatch.setattr(Toy, "name", "renamed")
    with pytest.raises(UserError, match="another method"):
        load_fit(Toy(layer=1), model, path)


def test_a_field_added_later_is_taken_at_its_default(tiny, tmp_path):
    model, path = tiny(), tmp_path / "fit"
    save_fit(Toy().fit(model), model, path)
    record = json.loads((path / "facts.json").read_text())
    del record["parameters"]["strict"]
    (path / "facts.json").write_text(json.dumps(record))
    load_fit(Toy(), model, path)
    with pytest.raises(UserError, match="another parameter strict"):
        load_fit(Toy(strict=True), model, path)


def test_the_same_fit_serves_another_precision(tiny, tmp_path):
    save_fit(Toy().fit(tiny()), tiny(), tmp_path / "fit")
    assert load_fit(Toy(), tiny().to(torch.bfloat16), tmp_path / "fit").tensors


def test_saving_replaces_a_fit_and_nothing_else(tiny, tmp_path):
    model, path = tiny(), tmp_path / "fit"
    save_fit(Toy(layer=1).fit(model), model, path)
    save_fit(Toy(layer=2).fit(model), model, path)
    assert load_fit(Toy(layer=2), model, path).facts["layer"] == 2
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something other than a fit"):
        save_fit(Toy(layer=3).fit(model), model, path)
    assert (path / "notes.txt").read_text() == "mine"
    assert [x for x in tmp_path.iterdir() if x.name.startswith(".fit")] == []


def test_facts_that_would_come_back_changed_are_refused(tiny, tmp_path):
    model = tiny()
    for facts in ({"pair": (1, 2)}, {3: "integer key"}, {"tensor": torch.ones(1)}):
        method = Toy().fit(model)
        method.facts = facts
        with pytest.raises(TypeError, match="facts must be plain JSON"):
            save_fit(method, model, tmp_path / "fit")
    assert list(tmp_path.iterdir()) == []


def test_several_at_once_fit_once(tiny, tiny_corpus):
    model = tiny()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fit_cached(Toy(), model, tiny_corpus), range(4)))
    assert Toy.fits == 1
    for other in found[1:]:
        assert_same_fit(found[0], other)


def test_an_error_in_fit_leaves_nothing_behind(tiny, own_cache, monkeypatch):
    monkeypatch.setattr(Toy, "fit", lambda self, model, corpus: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_cached(Toy(), tiny(), None)
    assert [x for x in own_cache.rglob("*") if x.is_file() and x.suffix != ".lock"] == []


def test_the_key_is_the_same_in_another_process(tiny, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from toys import Toy\n"
        "from dyndepth import load_model; from dyndepth.fitting.fits import fit_key\n"
        "print(fit_key(Toy(), load_model(sys.argv[1]), None))"
    )
    arguments = [str(tmp_path / "model"), str(Path(__file__).parents[1] / "helpers")]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == fit_key(Toy(), model, None)


def test_a_kept_fit_says_how_long_it_took(tiny, monkeypatch):
    model, clock = tiny(), SimpleNamespace(monotonic=iter([10.0, 13.0]).__next__)
    monkeypatch.setattr(fits, "time", clock)
    assert fit_cached(Toy(), model, None).fit_seconds == 3.0
    assert fit_cached(Toy(), model, None).fit_seconds == 3.0  # kept, not made again
    assert Toy().fit_seconds is None
