"""A headless Chromium for the tests of the page, from wherever a machine keeps one."""

from __future__ import annotations

import os
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRIVERS = ("chromedriver",)
DEBIAN = ("/usr/bin", "/usr/lib/chromium", "/usr/lib/chromium-browser")
"""Where Debian and Ubuntu put both, on the PATH or not."""
INSTALL = "install both, on Debian by: apt-get install chromium chromium-driver"
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # root may not use it
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def candidates(names: tuple[str, ...], fetched: str) -> list[str]:
    """Executables of these ``names``; after them those that selenium has ``fetched`` before.

    Nothing is fetched here: selenium's own finder asks the network.
    """
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *DEBIAN))
    cache = Path(os.path.expanduser(os.environ.get("SE_CACHE_PATH", "~/.cache/selenium")))
    kept = sorted(map(str, cache.glob(f"{fetched}/*/*/{fetched}")), reverse=True)
    return [*filter(None, (shutil.which(name, path=path) for name in names)), *kept]


def start(folder: Path) -> Any:
    """The first pair of browser and driver that opens a file; skips the test where none does.

    ``folder`` must be empty: the browser's profiles go there. The browser reports its console and
    every request.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    browsers, drivers = candidates(BROWSERS, "chrome"), candidates(DRIVERS, "chromedriver")
    missing = [name for name, had in (("Chromium", browsers), ("chromedriver", drivers)) if not had]
    if missing:
        pytest.skip(f"there is no {' and no '.join(missing)} here; {INSTALL}")
    sample, why = folder / "sample.html", []
    sample.write_text("<title>read</title>", encoding="utf-8")
    for number, (browser, driver) in enumerate(product(browsers, drivers)):
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for argument in (*ARGUMENTS, f"--user-data-dir={folder / str(number)}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        try:
            running = webdriver.Chrome(options=options, service=Service(driver))
        except WebDriverException as error:
            why.append(f"{browser} by {driver}: {str(error.msg).partition(chr(10))[0]}")
            continue
        running.get(sample.as_uri())
        if running.title == "read":
            return running
        running.quit()
        why.append(f"{browser} by {driver}: it does not read {sample}, as one from a snap")
    pytest.skip(f"no browser starts ({'; '.join(why)}); {INSTALL}")
