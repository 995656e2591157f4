"""Runs the checks beside another device, ``standin_checks``, in a process of their own.

torch takes no new device once it has run a backward pass.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).parents[1] / "helpers" / "standin_checks.py"


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch knows no devices that are written in Python",
)
def test_beside_another_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(
        command,
        cwd=CHECKS.parents[1],
        env=os.environ | {"DYNDEPTH_TEST_DEVICE": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    assert " passed" in done.stdout
