"""`jaxlayout doctor`."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from jaxlayout.cli.base import command, print_json, print_text
from jaxlayout.cli.checks import Finding, look_around
from jaxlayout.cli.settings import add_options
from jaxlayout.cli.show import table_path

DOCTOR = """\
example:

  $ jaxlayout doctor
  ok       versions   jaxlayout 0.1.0, Python 3.12.8, jax 0.12.0, jaxlib 0.12.0, numpy 2.4.0
  ok       table      table.sqlite: 812 measurements, 9 plans, in 4 environments
  note     noise      a matrix product takes 6.10 ms ±8.2%, 1.1% of 480 runs took 1.5 times that or more; load 1.2
                      Which of two forms is faster may come out wrong below a difference of 16%.
  ...

note: worth knowing. warning: tuning works, but not as well as it could. problem: something does not work.

exit codes: 0, 1 if there is a problem."""

COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}
INDENT = 20
"""Where what was found begins."""


def add_to(commands: Any) -> None:
    """Declare it."""
    summary = "Look at versions, machine, settings, cost table, and how noisy times are here."
    doctor = command(commands, "doctor", _doctor, summary, DOCTOR, prints_data=True)
    text = "how long to measure noise, 0 for not at all (default: 3)"
    doctor.add_argument("--seconds", type=float, default=3.0, metavar="NUMBER", help=text)
    add_options(doctor, only=("table",))


def _doctor(given: argparse.Namespace) -> int:
    findings: list[Finding] = []
    for finding in look_around(given.seconds, table_path(given)):
        findings.append(finding)
        if not given.json:
            print_text(in_colour(finding))  # one by one: the last takes seconds
    found_problem = any(finding.grade == "problem" for finding in findings)
    if given.json:
        print_json({"ok": not found_problem, "findings": [finding.to_json() for finding in findings]})
    return int(found_problem)


def in_colour(finding: Finding) -> Any:
    """A finding as rich prints it."""
    from rich.text import Text

    return Text.assemble(
        (f"{finding.grade:<9}", COLOURS[finding.grade]),
        (f"{finding.check:<11}", "bold"),
        hanging([finding.found, finding.advice]),
    )


def hanging(paragraphs: Sequence[str]) -> str:
    """Text to the right of INDENT."""
    width = max(40, min(120, shutil.get_terminal_size((120, 24)).columns) - INDENT)
    lines = [line for text in paragraphs for line in textwrap.wrap(text, width, break_on_hyphens=False)]
    return ("\n" + INDENT * " ").join(lines)
