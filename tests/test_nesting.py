"""Decorated functions inside others: nobody waits for himself, in whatever composition."""

from __future__ import annotations

import subprocess
import sys

import nested
from helpers import ROOT

DEADLINE = 300
"""Seconds that all compositions together may take; they need some 30."""


def test_no_composition_waits_for_itself():
    """In a process of its own: nothing that measures or judges is replaced there."""
    script = f"import faulthandler, runpy; faulthandler.dump_traceback_later({DEADLINE}, exit=True)\n"
    script += "runpy.run_path('tests/nested.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == list(nested.COMPOSITIONS), done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
