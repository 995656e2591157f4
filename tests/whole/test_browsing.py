"""Where a browser for the tests of the page is looked for, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import browsing
import pytest

VERSIONS = (
    "chromedriver/linux64/126.0.1/chromedriver",
    "chromedriver/linux64/127.0.1/chromedriver",
)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without a browser; folders that may get one: on the PATH, Debian's, selenium's."""
    folders = [tmp_path / name for name in ("path", "debian", "selenium")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("PATH", str(folders[0]))
    monkeypatch.setattr(browsing, "DEBIAN", (str(folders[1]),))
    monkeypatch.setenv("SE_CACHE_PATH", str(folders[2]))
    return folders


def put(path: Path, script: str = "exit 3") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_the_path_goes_before_debian_and_debian_before_what_selenium_fetched(bare):
    path, debian, selenium = bare
    fetched = [put(selenium / version) for version in VERSIONS]
    assert browsing.candidates(browsing.DRIVERS, "chromedriver") == fetched[::-1]
    installed = put(debian / "chromedriver")
    assert browsing.candidates(browsing.DRIVERS, "chromedriver") == [installed, *fetched[::-1]]
    first = put(path / "chromedriver")
    assert browsing.candidates(browsing.DRIVERS, "chromedriver") == [first, *fetched[::-1]]
    assert browsing.candidates(browsing.BROWSERS, "chrome") == []


def test_selenium_s_cache_is_looked_for_at_home(bare, monkeypatch):
    monkeypatch.delenv("SE_CACHE_PATH")
    monkeypatch.setenv("HOME", str(bare[0]))
    kept = put(bare[0] / ".cache/selenium" / VERSIONS[0])
    assert browsing.candidates(browsing.DRIVERS, "chromedriver") == [kept]


@pytest.mark.parametrize(
    ("present", "sentence"),
    [
        ([], "there is no Chromium and no chromedriver here; install both, on Debian by: apt-get"),
        (["chromium"], "there is no chromedriver here; install both"),
        (["chromedriver"], "there is no Chromium here; install both"),
    ],
)
def test_what_is_missing_is_named_and_how_to_install_it(bare, tmp_path, present, sentence):
    for name in present:
        put(bare[1] / name)
    with pytest.raises(pytest.skip.Exception, match=sentence):
        browsing.start(tmp_path)


def test_pairs_that_do_not_start_are_named_each(bare, tmp_path):
    browser, drivers = put(bare[0] / "chromium"), [put(bare[0] / "chromedriver")]
    drivers.append(put(bare[2] / VERSIONS[0]))
    with pytest.raises(pytest.skip.Exception, match="no browser starts") as skipped:
        browsing.start(tmp_path)
    for driver in drivers:
        assert f"{browser} by {driver}: " in str(skipped.value)
    assert "Status code was: 3" in str(skipped.value)
