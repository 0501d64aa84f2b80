"""`jaxlayout tune` and `jaxlayout explain`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxlayout.cli.base import Failure, command, print_json, print_text
from jaxlayout.cli.settings import add_options, options_of
from jaxlayout.cli.target import HOW, add_target, target_of

KEPT = "; what was measured is kept, and the same command goes on from there"

TUNE = f"""\
{HOW}
example, with a file model.py:

  import jax

  def predict(images, kernel):
      return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", feature_group_count=64,
                                          dimension_numbers=("NHWC", "HWIO", "NHWC"))

  $ jaxlayout tune model.py:predict --args f32[8,56,56,64] f32[3,3,1,64] --plan plan.json
  kept: faster: 15.31x over 3 pairs (plan: measured, 4.2 s of tuning)
  ...

From then on any process of this user that calls auto_layout(predict) with arguments of these types plans from the
table; plan.json serves where there is no table: auto_layout(predict, plan=jaxlayout.Plan.load("plan.json")).

exit codes: 0 if the rewritten function is kept or there is nothing to gain, 1 if tuning failed, its numbers do not
agree with the original's, or others timed for longer than --lock-timeout, 130 after Ctrl-C: what was measured is in the
table."""

EXPLAIN = f"""\
{HOW}
example, after `jaxlayout tune model.py:predict --args f32[8,56,56,64] f32[3,3,1,64]`:

  $ jaxlayout explain model.py:predict --args f32[8,56,56,64] f32[3,3,1,64]
  kept: faster: 15.31x over 3 pairs (plan: stored, 4.2 s of tuning)
  ...

exit codes: as of `jaxlayout tune`; 1 also where the table lacks a measurement."""


def add_to(commands: Any) -> None:
    """Declare both."""
    summary = "Tune a function: measure what the table lacks, plan, judge, and print what was chosen and why."
    tune = command(commands, "tune", _tune, summary, TUNE, prints_data=True, interrupted=KEPT)
    add_target(tune)
    tune.add_argument("--plan", metavar="FILE", help="write the plan there: the empty one if nothing changes")
    add_options(tune)
    summary = "Print what was chosen for a function and why, from the table, measuring nothing."
    explain = command(commands, "explain", _explain, summary, EXPLAIN, prints_data=True)
    add_target(explain)
    add_options(explain, leave_out=("on_miss", "time_budget"))


def _tune(given: argparse.Namespace) -> int:
    return _explained(given, given.plan, **options_of(given))


def _explain(given: argparse.Namespace) -> int:
    from jaxlayout import TableMiss

    try:
        return _explained(given, None, **options_of(given, on_miss="error"))
    except TableMiss as miss:
        raise Failure(f"{miss}\nrun `jaxlayout tune` with the same arguments first") from None


def _explained(given: argparse.Namespace, plan: str | None, **options: Any) -> int:
    from jaxlayout import auto_layout

    fun, args, kwargs = target_of(given)
    explanation = auto_layout(fun, **options).explain(*args, **kwargs)
    outcome = explanation.outcome
    if plan is not None:
        outcome.applied.save(plan)
    if given.json:
        print_json({"target": given.target, "kept": outcome.kept} | explanation.to_json())
    else:
        print_text(explanation)
    return int(has_failed(outcome))


def has_failed(outcome: Any) -> bool:
    """Whether something went wrong, rather than that nothing was gained."""
    return outcome.verdict.cause in ("failure", "numbers")
