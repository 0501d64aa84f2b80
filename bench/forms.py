"""How much of the gain each freedom makes: one program in seven forms, in turn in one process.

    python -m bench.forms [case ...] [--table FILE] [--small] [--budget S] [--out bench/results]

Writes forms-jax<version>.json and .md into --out; where cases are named, the others' rows stay. The forms:

- `jit`: as written, under `jax.jit`.
- `auto_entry`: the same, arguments and results in the layouts that XLA would like (`Format(Layout.AUTO)`); the
  arguments are there in these before the time is taken.
- `channels_last`: the policy of that name, every convolution through XLA's own in NHWC, unmeasured.
- `channels_first`: the same in NCHW, but for kernel gradients, which stay as they are.
- `layouts`: the best plan with XLA's own convolutions only, in any order.
- `lowerings`: the best plan with any lowering, the orders as written.
- `auto_layout`: all of it, compiler options too, as it runs.

Columns: the median of jit in ms; of each other form its speed relative to jit, the median over rounds, and half the
interquartile range; `as written`: that form is the program itself. The largest difference of any form's results from
jit's, relative to their rms.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from bench import training
from bench.models import MODELS, video
from bench.networks import errors_from, restricted_plan
from bench.rows import Row, arguments, parsed, write_rows
from bench.scenarios import Program
from bench.timing import Contender, in_turn, machine, middle
from jaxlayout import AutoLayout, Candidate, ConvDimensionNumbers, ConvSignature, Plan, auto_layout
from jaxlayout.graph.build import Mode, Node, build_graph
from jaxlayout.graph.solve import solve
from jaxlayout.layout import LayoutPolicy, Order

FORMS = ("jit", "auto_entry", "channels_last", "channels_first", "layouts", "lowerings", "auto_layout")
SECONDS, MOST_ROUNDS, LEAST_ROUNDS = 60.0, 9, 3
"""About how long the rounds of a case may take, and how many there are."""


def network(name: str, small: bool) -> Program:
    model = MODELS[name]
    batch, size = (1, 32) if small else (model.batch, model.size)
    apply, params, images = model.build(batch, size, jax.random.key(0))
    return apply, (params, images)


def loop(name: str, small: bool) -> Program:
    case = training.CASES[name](small)
    return case.fun, case.args


def decoder(small: bool) -> Program:
    return video.decode, video.build(small)


CASES: dict[str, Callable[[bool], Program]] = (
    {name: partial(network, name) for name in ("mobilenet_v2", "mobilenet_v2_nchw", "resnet50_nchw")}
    | {name: partial(loop, name) for name in ("flax_scan",)}
    | {"video_f32": decoder}
)


def channels_first(conv: ConvSignature, written: Candidate) -> Candidate:
    """XLA's own convolution channels first; as written where it is that already, and for a kernel gradient, of which no
    such order is known."""
    dims = ConvDimensionNumbers.channels_first(conv.rank)
    same = (dims.lhs, dims.out) == (written.dims.lhs, written.dims.out)
    return written if same or conv.is_kernel_gradient else Candidate("xla", dims)


def channels_first_plan(jaxpr: Any) -> Plan:
    """All convolutions so, whatever that costs, and the least conversions otherwise."""
    policy = LayoutPolicy.for_device()

    def site_ns(node: Node, mode: Mode) -> float:
        written = node.modes[0].candidate
        if node.conv is None or written is None:
            return 0.0
        return 0.0 if mode.candidate == channels_first(node.conv, written) else 1e15

    def conversion_ns(shape: Any, dtype: Any, held: Order, turned: Order) -> float:
        return policy.conversion_ns(math.prod(shape) * dtype.itemsize)

    graph = build_graph(jaxpr, lambda conv, written: list(dict.fromkeys((written, channels_first(conv, written)))))
    plan = solve(graph, site_ns, conversion_ns)
    if plan.predicted_ns >= 1e15:
        raise ValueError("an order that was to be forced does not reach its convolution")
    return plan


def auto_entry(fun: Callable[..., Any], args: tuple[Any, ...]) -> Contender:
    """Compiled for the layouts that XLA likes for arguments and results, and called with arguments in these."""
    like: Any = Format(Layout.AUTO)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    compiled = jax.jit(fun, in_shardings=like, out_shardings=like).lower(*shapes).compile()
    laid = jax.tree.map(jax.device_put, args, compiled.input_formats[0])
    return lambda: compiled(*laid)


def contenders_of(fun: Any, args: tuple[Any, ...], table: str | None, budget: float) -> Mapping[str, Contender | None]:
    """By form, what runs it; None where it is the program as written."""
    tuned, last = auto_layout(fun, table=table, time_budget=budget), auto_layout(fun, policy="channels_last")
    jaxpr = jax.make_jaxpr(fun)(*args)

    def under(plan: Plan) -> Contender | None:
        return None if plan.trivial else partial(auto_layout(fun, table=table, plan=plan), *args)

    def if_kept(form: AutoLayout) -> Contender | None:
        return partial(form, *args) if form.outcome(*args).kept else None

    if_kept(tuned)  # first of all: it measures what the other plans need
    return {
        "jit": partial(jax.jit(fun), *args),
        "auto_entry": auto_entry(fun, args),
        "channels_last": if_kept(last),
        "channels_first": under(channels_first_plan(jaxpr)),
        "layouts": under(restricted_plan(jaxpr, table, lambda candidate, _: candidate.lowering == "xla")),
        "lowerings": under(restricted_plan(jaxpr, table, lambda candidate, written: candidate.dims == written.dims)),
        "auto_layout": if_kept(tuned),
    }


def run(name: str, table: str | None, small: bool, budget: float) -> Row:
    """One row."""
    forms = contenders_of(*CASES[name](small), table, budget)
    calls = {form: lambda call=call: jax.block_until_ready(call()) for form, call in forms.items() if call is not None}
    expected = jax.tree.map(jnp.asarray, calls["jit"]())
    apart = max(errors_from(expected, *(call() for form, call in calls.items() if form != "jit")))
    once = {form: values[0] for form, values in in_turn(calls, 1).items()}
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / sum(0.1 + 2 * s for s in once.values()))))
    seconds = in_turn(calls, LEAST_ROUNDS if small else rounds)
    row: Row = {"case": name, "jit_ms": 1e3 * middle(seconds["jit"])[0], "apart": apart, "forms": {}}
    for form in FORMS[1:]:
        if form in seconds:
            ratio, spread = middle([a / b for a, b in zip(seconds["jit"], seconds[form], strict=True)])
            row["forms"][form] = {"ms": 1e3 * middle(seconds[form])[0], "ratio": ratio, "spread": spread}
    jax.clear_caches()
    return row


def markdown(rows: list[Row]) -> str:
    """The table."""

    def cell(row: Row, form: str) -> str:
        found = row["forms"].get(form)
        return "as written" if found is None else f"{found['ratio']:.2f}x ±{found['spread']:.2f}"

    names = [form.replace("_", " ") if form != "auto_layout" else form for form in FORMS[1:]]
    head = f"| case | jit ms | {' | '.join(names)} | apart |\n|---|---|{'---|' * len(names)}---|\n"
    lines = [
        f"| {r['case']} | {r['jit_ms']:.1f} | {' | '.join(cell(r, form) for form in FORMS[1:])} | {r['apart']:.0e} |"
        for r in rows
    ]
    return f"{machine()}, `python -m bench.forms`\n\n{head}" + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the tables, after each case anew."""
    given = parsed(arguments("forms", __doc__, CASES), CASES, argv)
    write_rows(
        given.out / f"forms-jax{jax.__version__}{'-small' * given.small}",
        given.cases,
        CASES,
        lambda name: run(name, given.table, given.small, given.budget),
        markdown,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
