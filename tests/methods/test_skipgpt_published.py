"""Published router checkpoints: what is read, that it decides as published, what is refused."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from conftest import DEVICE

from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method
from dyndepth.data.corpus import Corpus
from dyndepth.fitting.fits import read_fit
from dyndepth.methods.skipgpt import SkipGPT, published
from dyndepth.methods.skipgpt.published import read_published
from dyndepth.runtime.attach import attach

LAYERS, HIDDEN = 4, 32


def published_state(layers: int = LAYERS, hidden: int = HIDDEN, seed: int = 0) -> dict:
    """A state dict of the published layout, about a third of whose gates skip."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in range(layers):
        for kind in ("attention", "mlp"):
            base = f"model.layers.{layer}.router_{kind}.weight_predictor"
            state[f"{base}.weight"] = torch.randn(2, hidden, generator=generator) / hidden**0.5
            state[f"{base}.bias"] = torch.tensor([0.4, 0.0])
    return state


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(published_state(), tmp_path / "router.pth")
    return tmp_path / "router.pth"


def published_forward(model, state, tokens):
    """The published rule, written down independently: every branch computed, then multiplied."""
    hidden = model.model.embed_tokens(tokens)
    places = torch.arange(tokens.shape[1], device=tokens.device)[None]
    rotary = model.model.rotary_emb(hidden, position_ids=places)
    for index, layer in enumerate(model.model.layers):
        gates = []
        for kind in ("attention", "mlp"):
            base = f"model.layers.{index}.router_{kind}.weight_predictor"
            weight, bias = (state[f"{base}.{part}"].to(DEVICE) for part in ("weight", "bias"))
            logits = torch.nn.functional.linear(hidden, weight, bias)
            gates.append((logits.argmax(-1, keepdim=True) == 0).float())
        branch, _ = layer.self_attn(
            layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None
        )
        hidden = hidden + gates[0] * branch
        hidden = hidden + gates[1] * layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


def imported(path, model) -> SkipGPT:
    method = SkipGPT(target_speedup=2.0, normalise=False)
    method.tensors, method.facts = read_published(path, model)
    return method


def test_tensors_are_the_differences_of_the_two_logits(tiny, checkpoint):
    state = published_state()
    tensors, facts = read_published(checkpoint, tiny())
    assert tensors["weight"].shape == (LAYERS, 2, HIDDEN)
    assert tensors["bias"].shape == (LAYERS, 2)
    for layer in range(LAYERS):
        for sublayer, kind in enumerate(("attention", "mlp")):
            base = f"model.layers.{layer}.router_{kind}.weight_predictor"
            execute, skip = state[f"{base}.weight"]
            assert torch.equal(tensors["weight"][layer, sublayer], execute - skip)
            execute, skip = state[f"{base}.bias"]
            assert torch.equal(tensors["bias"][layer, sublayer], execute - skip)
    assert facts == {"threshold": 0.0, "normalise": False, "imported": "router.pth"}


def test_half_precision_files_are_read_in_float32(tiny, tmp_path):
    state = {key: value.bfloat16() for key, value in published_state().items()}
    torch.save(state, tmp_path / "half.pth")
    tensors, _ = read_published(tmp_path / "half.pth", tiny())
    first = state["model.layers.0.router_attention.weight_predictor.weight"].float()
    assert torch.equal(tensors["weight"][0, 0], first[0] - first[1])


def test_the_published_forward_is_reproduced_exactly(tiny, checkpoint):
    """``masked`` bit for bit; ``sparse`` to float tolerance, for its products have other shapes."""
    model, method = tiny(), imported(checkpoint, tiny())
    tokens = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits = {}
    for backend in ("masked", "sparse"):
        with torch.no_grad(), attach(model, method, backend=backend) as trace:
            logits[backend] = model(tokens).logits
            executed = trace.executed()
    with torch.no_grad():
        reference = published_forward(model, published_state(), tokens)
    assert torch.equal(logits["masked"], reference)
    torch.testing.assert_close(logits["sparse"], logits["masked"], atol=1e-5, rtol=0)
    assert ((executed > 0.2) & (executed < 0.95)).all()


def test_a_tie_executes(tiny, tmp_path):
    torch.save({k: torch.zeros_like(v) for k, v in published_state().items()}, tmp_path / "0.pth")
    model = tiny()
    with attach(model, imported(tmp_path / "0.pth", model)) as trace:
        model(torch.arange(3, 20, device=DEVICE)[None])
    assert (trace.executed() == 1).all()


def changed(change) -> dict:
    state = published_state()
    change(state)
    return state


BASE = "model.layers.2.router_mlp.weight_predictor"
BLOCK = [key for key in published_state() if key.startswith("model.layers.1.")]
WRONG = {
    "no routers for block 1": changed(lambda s: [s.pop(key) for key in BLOCK]),
    rf"lacks {BASE}\.bias": changed(lambda s: s.pop(f"{BASE}.bias")),
    "routers for 3 blocks, the model has 4": published_state(layers=3),
    "routers for 6 blocks, the model has 4": published_state(layers=6),
    "routers for 0 blocks, the model has 4": {},
    r"the shape \[2, 48\], this model needs \[2, 32\]": published_state(hidden=48),
    r"the shape \[1\], this model needs \[2\]": changed(
        lambda s: s.update({f"{BASE}.bias": torch.zeros(1)})
    ),
    "1 tensors that belong to no router, 'lm_head.weight'": changed(
        lambda s: s.update({"lm_head.weight": torch.zeros(2)})
    ),
    "holds MLP routers": changed(lambda s: s.update({f"{BASE}.0.weight": torch.zeros(8, 32)})),
    "no mapping of names to tensors": [torch.zeros(2)],
    "values that are not finite": changed(
        lambda s: s.update({f"{BASE}.bias": torch.tensor([0.0, float("nan")])})
    ),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_files_are_told_in_one_sentence(tiny, tmp_path, sentence):
    torch.save(WRONG[sentence], tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=sentence) as told:
        read_published(tmp_path / "wrong.pth", tiny())
    assert "\n" not in str(told.value)


def test_what_is_no_checkpoint_is_told(tiny, tmp_path):
    with pytest.raises(UserError, match="no router checkpoint at"):
        read_published(tmp_path / "absent.pth", tiny())
    with pytest.raises(UserError, match="no router checkpoint at"):
        read_published(tmp_path, tiny())
    for content in (b"", b"hello", b"PK\x03\x04" + b"\0" * 60, pickle.dumps({"a": 1}, 2)):
        (tmp_path / "garbage.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"garbage\.pth"):
            read_published(tmp_path / "garbage.pth", tiny())


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_without_executing(tiny, tmp_path, legacy):
    trap = tmp_path / "trap"
    torch.save(
        published_state() | {"x": Malicious(trap)},
        tmp_path / "evil.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(UserError, match="would run code, which are never loaded"):
        read_published(tmp_path / "evil.pth", tiny())
    assert not trap.exists()
    # That the file was not harmless: it names the call, and the call touches the trap.
    content = (tmp_path / "evil.pth").read_bytes()
    call, arguments = Malicious(trap).__reduce__()
    assert call.__name__.encode() in content
    assert str(trap).encode() in content
    call(*arguments).close()
    assert trap.exists()


@pytest.fixture(scope="module")
def long_corpus(tiny_corpus):
    """Text enough for calibration with the default settings."""
    texts = [" ".join(str(n * k % 97) for k in range(200)) for n in range(1, 80)]
    return Corpus(texts, tiny_corpus.tokenizer)


@pytest.fixture
def saved_model(tiny, tmp_path, monkeypatch, tiny_corpus, long_corpus):
    """A tiny model in a folder, and a corpus for its tokenizer."""
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("dyndepth.models.loading.load_tokenizer", lambda *_: tiny_corpus.tokenizer)
    monkeypatch.setattr("dyndepth.data.corpus.load_corpus", lambda *_: long_corpus)
    return str(tmp_path / "model")


@pytest.mark.parametrize("target", [None, 1.25])
def test_command_writes_routers_that_the_method_takes(
    tiny, long_corpus, saved_model, checkpoint, tmp_path, capsys, target
):
    folder = str(tmp_path / "routers")
    flags = [] if target is None else ["--target-speedup", str(target)]
    command = [str(checkpoint), "--model", saved_model, "--output-path", folder, *flags]
    assert published.main(command) == 0
    printed = json.loads(capsys.readouterr().out)["published"]
    record, tensors = read_fit(folder)
    assert record["facts"]["achieved_speedup"] == printed["block_speedup"]
    assert torch.equal(tensors["weight"], read_published(checkpoint, tiny())[0]["weight"])
    if target is None:
        assert printed["threshold"] == 0.0
        assert printed["block_speedup"] > 1.2
    else:
        assert printed["block_speedup"] == pytest.approx(target, rel=0.03)
    bare = load_method("skipgpt", routers=folder, target_speedup=1.25)
    model = tiny()
    with attach(model, bare.fit(model, long_corpus)):
        model(torch.ones(1, 4, dtype=torch.long, device=DEVICE))
    assert not bare._router.normalise, "published routers read the raw stream"
    taken = load_method(printed["spec"], target_speedup=1.25).fit(tiny(), long_corpus)
    assert torch.equal(taken.tensors["weight"], tensors["weight"])
    assert taken.facts["threshold"] == pytest.approx(printed["threshold"], abs=0.05)


def test_command_tells_wrong_input(saved_model, checkpoint, tmp_path, capsys):
    common = ["--model", saved_model, "--output_path", str(tmp_path / "out")]
    assert published.main([str(tmp_path / "no.pth"), *common]) == 2
    assert "no router checkpoint at" in capsys.readouterr().err
    assert published.main([str(checkpoint), *common, "--target_speedup", "0.5"]) == 2
    assert "a number above 1, not 0.5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
