"""Looks for known vulnerabilities of everything that is installed: ``python tests/whole/audit.py``.

``make audit`` runs it. pip-audit reports success where its service knows none of the packages, and
skips a version with a local label such as ``+cpu``; here a package that was not audited is never
taken for a clean one. Exit status: 0 clean, 1 vulnerable, 3 not audited, or not all of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

CLEAN, VULNERABLE, NOT_AUDITED = 0, 1, 3
SERVICES = {"pypi": "PyPI", "osv": "OSV"}
"""Services that pip-audit can ask, and their names; the second is asked if the first knows
nothing."""

OWN = "dyndepth"
Audit = Callable[[str, Mapping[str, str]], str]
"""``(service, versions by package) -> pip-audit's JSON``; other text where it gave up."""


def installed() -> dict[str, str]:
    """Version, without its local label, by distribution; this project left out."""
    found = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    found.pop(OWN, None)
    return {name: found[name].partition("+")[0] for name in sorted(found, key=str.lower)}


def pip_audit(service: str, versions: Mapping[str, str]) -> str:
    """What pip-audit prints as JSON, or else the last line of its complaint."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
        command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", service]
        command += ["--requirement", str(wanted), "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--desc", "off", "--progress-spinner", "off"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    complaint = done.stderr.strip().splitlines() or ["it printed nothing"]
    return done.stdout.strip() or complaint[-1]


def audit(versions: Mapping[str, str], ask: Audit = pip_audit) -> int:
    """Print what is vulnerable and what was not audited; return the exit status."""
    reasons = []
    for service, called in SERVICES.items():
        answer = ask(service, versions)
        try:
            found = json.loads(answer)["dependencies"]
        except (ValueError, KeyError, TypeError):
            reasons.append(f"{called}: {answer[:100]}")
            continue
        audited = [each for each in found if "vulns" in each]
        if not audited:
            reasons.append(f"{called}: it knows none of the {len(found)} packages")
            continue
        return _report(versions, audited, called)
    print(
        "not audited: no service of known vulnerabilities answers from here, so nothing is known "
        f"of the {len(versions)} installed packages; run `make audit` where one does",
        *reasons,
        sep="\n  ",
    )
    return NOT_AUDITED


def _report(versions: Mapping[str, str], audited: list[dict], called: str) -> int:
    known = {_plain(each["name"]) for each in audited}
    left = [name for name in versions if _plain(name) not in known]
    vulnerable = [each for each in audited if each["vulns"]]
    for each in vulnerable:
        for fault in each["vulns"]:
            fixed = ", ".join(fault.get("fix_versions", [])) or "no version yet"
            print(f"{each['name']} {each['version']}: {fault['id']}, fixed in {fixed}")
    if left:
        print(f"not audited, unknown to {called}: {', '.join(left)}")
    print(f"{len(audited)} packages audited by {called}, {len(vulnerable)} vulnerable")
    return VULNERABLE if vulnerable else NOT_AUDITED if left else CLEAN


def _plain(name: str) -> str:
    """A distribution's name as registries compare it."""
    return name.lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    sys.exit(audit(installed()))
