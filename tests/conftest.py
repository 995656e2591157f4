"""Shared by all tests: tiny models made from a configuration, and the embedded model, once."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if os.environ.get("DYNDEPTH_TEST_DEVICE") == "standin":
    import standin  # noqa: F401  # registers the device

DEVICE = torch.device(os.environ.get("DYNDEPTH_TEST_DEVICE", "cpu"))
"""Where the tests of what runs on a model's device put models and inputs."""

TINY_VOCABULARY = 96
TOLERANCE = 1e-4
"""Of logits in float32 that are added up in another order: by cache, padding, fewer rows.

Tiny models' logits reach 8, where float32 rounds by 5e-7, and such orders put them some 20
roundings apart, on each processor otherwise. One wrong gate of one token moves them by 0.1.
"""
PECULIAR: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1], "pad_token_id": 0},
    "granite": {"residual_multiplier": 0.6, "logits_scaling": 2.0, "attention_multiplier": 0.3},
    "gemma2": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {"rope_parameters": {"partial_rotary_factor": 0.5}, "sliding_window": 8},
    "gpt_neox": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "gpt2": {"n_inner": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}
"""Settings that bring out what is peculiar to a family."""


@functools.cache
def attentions(family: str) -> tuple[str, ...]:
    """Attention implementations that ``transformers`` has for a family, of those tested."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(family))]
    return ("sdpa", "eager") if cls._supports_sdpa else ("eager",)


def make_tiny(family: str = "llama", attn: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """A causal LM of 4 blocks in float32; ``changes`` go into its configuration.

    Where a family has no ``sdpa``, it is made with ``eager``. Weights are drawn wide enough that
    each branch moves the residual stream by about a third of its length, so that a wrong gate shows
    in the logits.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "vocab_size": TINY_VOCABULARY,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(family, **settings | PECULIAR.get(family, {}) | changes)
    attn = attn if attn in attentions(family) else "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attn, dtype=torch.float32
        )
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                embeds = any(part in name for part in ("embed", "wte", "wpe"))
                width = 1.0 if embeds else parameter.shape[1] ** -0.5
                torch.nn.init.normal_(parameter, std=width)
            elif name.endswith("weight"):
                torch.nn.init.uniform_(parameter, 0.7, 1.3)
            else:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False).to(DEVICE)


def variants() -> Any:
    """Parametrizes a test by all families, each with the attention implementations it has."""
    from dyndepth.models.families import FAMILIES

    pairs = [(family, attn) for family in FAMILIES for attn in attentions(family)]
    return pytest.mark.parametrize(("family", "attn"), pairs)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """What is collected and imported stays to the end: the garbage collector need not look at some
    million such objects again, each time that a test or the suite calls it."""
    import hypothesis  # noqa: F401  # it asks who refers to what is there, and sees no frozen ones

    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def gathered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are too small for gathering to pay: it is tested whether it pays or not.

    The marker ``rule`` leaves the rule in force.
    """
    from dyndepth.runtime import attach as runtime
    from dyndepth.runtime.limits import ALWAYS

    if request.node.get_closest_marker("rule") is None:
        monkeypatch.setattr(runtime, "limits_of", lambda model: ALWAYS)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """``tiny(family="llama", attn="sdpa", seed=0, **config)``: a fresh model; see make_tiny."""
    return make_tiny


@pytest.fixture(scope="session")
def embedded_model() -> Any:
    """The embedded model in float32 on the CPU. Shared: leave it as you found it."""
    from dyndepth.models.loading import load_model

    return load_model("embedded")


@pytest.fixture(scope="session")
def embedded_tokenizer() -> Any:
    """The tokenizer of the embedded model."""
    from dyndepth.models.loading import load_tokenizer

    return load_tokenizer("embedded")


@pytest.fixture(scope="session")
def corpus(embedded_tokenizer: Any) -> Any:
    """The embedded corpus, read by the embedded tokenizer."""
    from dyndepth.data.corpus import load_corpus

    return load_corpus("embedded", embedded_tokenizer)


class CharacterTokenizer:
    """A stand-in for a tokenizer of the tiny models: one token a character, EOS 2."""

    eos_token_id = 2
    pad_token_id = 0
    bos_token_id = 1

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        span = TINY_VOCABULARY - 3
        return {"input_ids": [[3 + ord(letter) % span for letter in text] for text in texts]}


@pytest.fixture(scope="session")
def tiny_corpus() -> Any:
    """A corpus of 60 short documents for the tiny models."""
    from dyndepth.data.corpus import Corpus

    texts = [f"Document {n}: " + " ".join(str(n * k % 97) for k in range(40)) for n in range(60)]
    return Corpus(texts, CharacterTokenizer())
