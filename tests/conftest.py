"""Shared by all tests: tiny models made from a configuration, and the embedded model, once."""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ATTENTIONS = ("sdpa", "eager")
TINY_VOCABULARY = 96


def make_tiny(family: str = "llama", attn: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """A causal LM of 4 blocks in float32; ``changes`` go into its configuration.

    Weights are drawn wide enough that each branch moves the residual stream by about a third of
    its length, so that a wrong gate shows in the logits.
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
    config = AutoConfig.for_model(family, **settings | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attn, dtype=torch.float32
        )
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                width = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
                torch.nn.init.normal_(parameter, std=width)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.7, 1.3)
            else:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """``tiny(family="llama", attn="sdpa", seed=0, **config)``: a fresh model; see make_tiny."""
    return make_tiny


@pytest.fixture(scope="session")
def embedded_model() -> Any:
    """The embedded model in float32 on the CPU. Shared: leave it as you found it."""
    from dyndepth.models import load_model

    return load_model("embedded")


@pytest.fixture(scope="session")
def embedded_tokenizer() -> Any:
    """The tokenizer of the embedded model."""
    from dyndepth.models import load_tokenizer

    return load_tokenizer("embedded")


@pytest.fixture(scope="session")
def corpus(embedded_tokenizer: Any) -> Any:
    """The embedded corpus, read by the embedded tokenizer."""
    from dyndepth.corpus import load_corpus

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
    from dyndepth.corpus import Corpus

    texts = [f"Document {n}: " + " ".join(str(n * k % 97) for k in range(40)) for n in range(60)]
    return Corpus(texts, CharacterTokenizer())
