"""Shapes: random weights where they run, equal in structure to a model that is made as usual; timed
and never scored."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import CharacterTokenizer, make_tiny
from transformers import AutoModelForCausalLM

from dyndepth import fit, importance, recovered
from dyndepth.common.errors import UserError
from dyndepth.lm_eval_plugin.model import NamedLM
from dyndepth.models.loading import (
    checked_config,
    layer_count,
    load_model,
    load_tokenizer,
    longest_window,
)
from dyndepth.models.shapes import random_fingerprint, shape_for, shapes
from dyndepth.routes import __main__ as routes
from dyndepth.runtime.attach import attach
from dyndepth.sweep import __main__ as sweep

PARAMETERS = {
    "llama-3-8b": 8_030_261_248,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "tiny": 722_048,
}
"""As the cards of the models say."""
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
RANDOM = "has random weights: it can be timed \\(bench, timing\\), not scored"


def written(folder: Path, family: str = "llama", **changes) -> str:
    """The shape of a tiny model's configuration in ``folder``."""
    folder.mkdir(exist_ok=True)
    config = make_tiny(family, **changes).config.to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return f"shape:{folder}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_known_shapes_have_the_sizes_of_their_models(name):
    assert set(shapes()) == set(PARAMETERS)
    config = checked_config(f"shape:{name}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(each.numel() for each in model.parameters()) == PARAMETERS[name]
    assert layer_count(f"shape:{name}") == len(model.model.layers)
    assert longest_window(f"shape:{name}") == config.max_position_embeddings
    assert max(config.bos_token_id, config.eos_token_id) < config.vocab_size
    assert (
        config.rope_parameters["rope_theta"]
        == shapes()[name]["config"]["rope_parameters"]["rope_theta"]
    )
    assert ("/" in shapes()[name]["source"]) is (shapes()[name].get("use") != "trial")


def test_each_use_has_one_shape():
    uses = ["bench", "training", "trial"]
    assert sorted(shape.get("use", "") for shape in shapes().values())[-3:] == uses
    assert PARAMETERS[shape_for("bench").removeprefix("shape:")] > 7e9
    assert shape_for("trial") == "shape:tiny"


def test_a_shape_is_offered_where_it_will_do(capsys):
    for door, offered in (("bench", True), ("timing", True), ("sweep", False), ("fit", False)):
        with pytest.raises(SystemExit):
            import_module(f"dyndepth.{door}{'' if door == 'fit' else '.__main__'}").main(["--help"])
        assert ("shape:NAME" in capsys.readouterr().out) is offered, door


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": SCALED, "tie_word_embeddings": True}),
        ("qwen2", {}),
        ("gpt_neox", {}),
        ("gpt2", {}),
    ],
)
def test_a_shape_is_a_model_made_as_usual(tmp_path, family, changes, dtype):
    name = written(tmp_path, family, **changes)
    model = load_model(name, dtype=dtype, attn_implementation="eager")
    usual = AutoModelForCausalLM.from_config(
        checked_config(name), dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    assert str(model) == str(usual)
    kinds = [{n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (model, usual)]
    assert kinds[0] == kinds[1]
    found, expected = dict(model.named_buffers()), dict(usual.named_buffers())
    assert found.keys() == expected.keys()
    for key, buffer in expected.items():
        assert found[key].dtype == buffer.dtype
        assert torch.equal(found[key], buffer), key
    frequencies = [each for key, each in found.items() if key.endswith("inv_freq")]
    assert {each.dtype for each in frequencies} <= {torch.float32}
    assert bool(frequencies) == (family != "gpt2")
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is model.config.tie_word_embeddings


def test_weights_are_spread_as_the_configuration_says(tmp_path):
    name = written(tmp_path, initializer_range=0.3, hidden_size=128, intermediate_size=512)
    model = load_model(name)
    for weight in (model.model.layers[1].mlp.up_proj.weight, model.lm_head.weight):
        assert weight.std().item() == pytest.approx(0.3, rel=0.02)
        assert weight.mean().item() == pytest.approx(0, abs=0.01)


def test_weights_repeat_and_disturb_no_other_random_number(tmp_path):
    name = written(tmp_path)
    torch.manual_seed(7)
    first = load_model(name)
    drawn = torch.rand(3)
    torch.manual_seed(8)
    second = load_model(name)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert first.dyndepth == second.dyndepth


def test_what_a_shape_is_stands_on_it(tmp_path):
    name = written(tmp_path / "one")
    info = load_model(name).dyndepth
    assert (info.name, info.revision) == (name, "random weights, seed 0")
    assert re.fullmatch("[0-9a-f]{16}", info.fingerprint)
    others = [
        load_model(name, dtype="bfloat16"),
        load_model(written(tmp_path / "two", rms_norm_eps=1e-3)),
        load_model(written(tmp_path / "three", initializer_range=0.1)),
    ]
    found = {info.fingerprint, *(each.dyndepth.fingerprint for each in others)}
    assert len(found) == 4
    assert random_fingerprint(load_model(f"{name}/config.json")) == info.fingerprint


def test_a_shape_can_be_attached_to(tmp_path):
    from dyndepth.timing.jobs import method

    model = load_model(written(tmp_path))
    with attach(model, method("static_15", model, 1, 8)) as trace:
        assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert trace.totals()["block_flops"] < trace.totals()["dense_block_flops"]


def test_what_is_no_shape_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no shape 'lama-3-8b'; did you mean llama-3-8b") as told:
        load_model("shape:lama-3-8b")
    assert all(name in str(told.value) for name in PARAMETERS)
    for name in ("shape:", f"shape:{tmp_path}", f"shape:{tmp_path}/absent.json"):
        with pytest.raises(UserError, match="give the path of a config.json"):
            layer_count(name)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="can't be read as a configuration"):
        layer_count(f"shape:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UserError, match="'mamba' is not supported"):
        load_model(f"shape:{tmp_path}")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})
    )
    with pytest.raises(UserError, match="not a causal language model"):
        load_model(f"shape:{tmp_path}")
    with pytest.raises(UserError, match="has no revisions"):
        load_model("shape:mistral-7b", revision="main")
    with pytest.raises(UserError, match="is made on one device"):
        load_model("shape:mistral-7b", device="auto")


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (sweep.main, ["--methods", "uls"]),
        (fit.main, ["uls"]),
        (importance.main, []),
        (recovered.main, ["--methods", "uls"]),
        (routes.main, ["--methods", "uls", "--output_path", "recorded"]),
    ],
)
def test_nothing_is_scored_or_trained(main, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--model", "shape:qwen2.5-7b"]) == 2
    assert re.search(f"shape:qwen2.5-7b {RANDOM}", capsys.readouterr().err)


def test_lm_eval_is_refused(tmp_path):
    with pytest.raises(UserError, match=RANDOM):
        NamedLM("shape:llama-3-8b", "dense")
    with pytest.raises(UserError, match=RANDOM):
        NamedLM(load_model(written(tmp_path)), "dense", CharacterTokenizer())
    with pytest.raises(UserError, match=RANDOM):
        load_tokenizer("shape:llama-3-8b")


def test_shapes_are_shipped_as_package_data():
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^"dyndepth.models" = \["\*\.json"\]', text, re.MULTILINE)
