"""What `explain` tells: as a value, as text, HTML, JSON and pictures."""

from __future__ import annotations

import html.parser
import inspect
import io
import json
import math
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from helpers import normal
from jax import lax
from made_up import measurement
from rich.console import Console

from jaxlayout import Explanation, auto_layout
from jaxlayout.report import Step
from jaxlayout.report.plots import lanes
from jaxlayout.tuning import pipeline
from jaxlayout.verify.accept import Verdict

X = normal(0, 2, 4, 8, 8)
K = normal(1, 4, 4, 3, 3)
D = K[:, :1]


def conv(x, k):
    """As in `helpers`, but written here: reports name its line."""
    return lax.conv_general_dilated(x, k, (1, 1), "SAME")


def net(x, k, d):
    y = jax.nn.relu(lax.conv_general_dilated(x, k, (1, 1), "SAME"))
    y = y + lax.conv_general_dilated(y, d, (1, 1), "SAME", feature_group_count=4)
    y = jnp.transpose(y, (0, 2, 3, 1))
    return jnp.sort(y, axis=-1), lax.conv_general_dilated(x, k, (1, 1), "SAME")


def step(k, x):
    loss, grad = jax.value_and_grad(lambda k: jnp.mean(jax.nn.relu(conv(conv(x, k), k)) ** 2))(k)
    return loss, k - 0.1 * grad


def looped(x, k):
    return lax.scan(lambda c, _: (jnp.tanh(conv(c, k)), None), x, None, length=4)[0]


PROGRAMS = {"net": (net, (X, K, D)), "step": (step, (K, X)), "looped": (looped, (X, K)), "plain": (conv, (X, K))}


def line_of(function, words):
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if words in line)


def judged(monkeypatch, **seen):
    """Every plan gets this verdict."""
    verdict = Verdict(**({"kept": True, "reason": "forced"} | seen))
    monkeypatch.setattr(pipeline.Pipeline, "judge", lambda pipeline, plan: verdict)


def shown(told, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(told)
    return console.file.getvalue()


# The value


def test_what_was_chosen_and_against_what(forced):
    told = auto_layout(net).explain(X, K, D)
    assert isinstance(told, Explanation) and told.name == "net" and len(told.sites) == 3
    first, depthwise, last = told.sites
    assert (first.kind, depthwise.kind, last.kind) == ("3x3", "depthwise 3x3", "3x3")
    assert f"test_report.py:{line_of(net, 'relu')}:" in first.line
    assert first.caller == first.line and (first.lhs, first.rhs, first.out) == (X.shape, K.shape, X.shape)
    assert first.dtype == "float32" and first.times == 1
    for site in told.sites:
        assert not site.chosen.written and site.chosen.candidate.lowering == "xla"
        times = [one.measurement.median_ns for one in site.tried]
        assert times == sorted(times) and site.tried[-1].written
        assert {one.measurement.status for one in site.tried} == {"ok"}
    assert len(depthwise.tried) > 3 and "shifted" in {one.candidate.lowering for one in depthwise.tried}
    assert "xla:NCHW,OIHW->NCHW" in str(first) and "chosen" in str(first)


def test_candidates_that_failed_are_told(forced, monkeypatch):
    def measure(jobs, **_):
        for job in jobs:
            found = {name: measurement(1e6 + i) for i, name in enumerate(job.alternatives)}
            for name, status in zip(list(found)[1:], ("wrong", "failed", "pruned"), strict=False):
                gone = dict.fromkeys(("median_ns", "spread_ns"))
                found[name] = type(found[name])(
                    **gone, status=status, runs=0, error=math.inf, temp_bytes=None, program="", detail="why <not>"
                )
            yield job, found

    monkeypatch.setattr(pipeline, "measure", measure)
    told = auto_layout(conv).explain(X, K)
    (site,) = told.sites
    assert [one.measurement.status for one in site.tried][-3:] == ["wrong", "failed", "pruned"]
    assert all(word in str(site) for word in ("wrong", "failed", "pruned", "inf"))
    assert (
        json.loads(json.dumps(told.to_json(), allow_nan=False))["convolutions"][0]["candidates"][-1]["error"] == "inf"
    )
    assert "why &lt;not&gt;" in told._repr_html_()


@pytest.mark.parametrize("name", PROGRAMS)
def test_conversions_are_those_of_the_plan(forced, name):
    f, args = PROGRAMS[name]
    told = auto_layout(f).explain(*args)
    plan = Counter((c.shape, c.dtype, c.times) for c in told.outcome.plan.conversions)
    found = Counter((m.shape, m.dtype, m.times) for m in told.moves)
    own = sum(not one.absorbed for one in told.transposes)
    assert plan and found <= plan and own == (plan - found).total()
    for move in told.moves:
        assert move.measured and move.ns == 1.0 and move.held != move.wanted


def test_why_a_conversion_stands_where_it_does(forced):
    told = auto_layout(net).explain(X, K, D)
    image, last = told.moves  # kernels stay as they are
    assert (image.held, image.wanted, image.held_by) == ("NCHW", "NHWC", "argument 0")
    assert image.wanted_by == tuple(
        f"3x3 at test_report.py:{line_of(net, words)} (net)" for words in ("relu", "return")
    )
    assert (last.held, last.wanted, last.wanted_by) == ("NHWC", "NCHW", ("result 1",))
    assert last.held_by == f"3x3 at test_report.py:{line_of(net, 'return')} (net)"


def test_transposes_and_barriers(forced):
    told = auto_layout(net).explain(X, K, D)
    (own,) = told.transposes
    assert own.absorbed and own.permutation == (0, 2, 3, 1) and own.shape == X.shape
    assert own.line == f"test_report.py:{line_of(net, 'jnp.transpose')} (net)"
    (barrier,) = told.barriers
    line = f"test_report.py:{line_of(net, 'jnp.sort')} (net)"  # of the jit that `sort` stands in
    assert (barrier.name, barrier.count, barrier.lines) == ("sort", 1, (line,))
    text = str(told)
    assert "absorbed" in text and line in text and "0 of your 1 stay" in text


def test_a_loop(forced):
    told = auto_layout(looped).explain(X, K)
    (site,) = told.sites
    assert site.times == 4 and len(site.path) > 1 and "in=nested" in site.signature
    assert {move.times for move in told.moves} == {1.0}  # around it
    assert [s.times for s in told.steps if s.kind == "convolution"] == [4.0]
    (before, *_, after), where = told.moves, f"test_report.py:{line_of(looped, 'scan')} (looped)"
    inside = f"3x3 at test_report.py:{line_of(conv, 'return')} (conv)"
    assert (before.held_by, before.wanted_by) == ("argument 0", (f"scan at {where}, before {inside}",))
    assert (after.held_by, after.wanted_by) == (f"scan at {where}, after {inside}", ("result 0",))


def test_a_training_step_has_what_is_derived(forced):
    told = auto_layout(step).explain(K, X)
    kinds = Counter(site.kind.split(",")[0] for site in told.sites)
    assert kinds == {"3x3": 2, "kernel gradient": 2, "gradient": 1}
    assert len({site.line for site in told.sites}) == 1  # that of what they are derived from
    assert {move.held for move in told.moves} | {move.wanted for move in told.moves} <= {
        *("NCHW", "NHWC", "OIHW", "HWIO", "HWOI", "IHWO", "IOHW", "CHWN", "CNHW", "NWHC"),
    }


def test_no_convolution():
    told = auto_layout(lambda x: x @ x).explain(X[0, 0])
    assert told.nothing_gained == "Nothing could be gained: there is no convolution in it."
    assert told.sites == told.moves == told.barriers == () and told.break_even is None
    assert told.nothing_gained in str(told) and told.nothing_gained in told._repr_html_()
    assert told.to_json()["convolutions"] == []


def test_nothing_is_faster_than_what_was_written(costs, monkeypatch):
    def measure(jobs, **_):
        for job in jobs:
            yield job, {name: measurement(1e6 + 1e6 * i) for i, name in enumerate(job.alternatives)}

    monkeypatch.setattr(pipeline, "measure", measure)
    told = auto_layout(conv).explain(X, K)
    assert told.nothing_gained.startswith("Nothing could be gained: the forms and orders as written are the fastest")
    (site,) = told.sites
    assert site.written is site.chosen and "as written" in str(told) and len(site.tried) > 1
    assert not told.outcome.kept and told.saved_ns == 0.0 and "never" in str(told)


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("time", "not faster as a whole (0.98x)"),
        ("numbers", "differ too much (0.98x)"),
        ("memory", "too much memory (0.98x)"),
        ("failure", "does not run (0.98x)"),
    ],
)
def test_why_nothing_was_gained(forced, monkeypatch, cause, words):
    judged(monkeypatch, kept=False, cause=cause, reason="0.98x", original_ns=1e6, tuned_ns=2e6, difference=math.inf)
    told = auto_layout(conv).explain(X, K)
    assert words in told.nothing_gained and told.nothing_gained.endswith(".")
    assert "left as it is" in str(told) and words.split(" (")[0] in told._repr_html_()
    data = told.to_json()
    assert not data["kept"] and data["nothing_gained"] == told.nothing_gained
    assert data["measured"]["difference"] == "inf" and data["measured"]["break_even"] is None


def test_what_is_won_back(forced, monkeypatch):
    judged(monkeypatch, original_ns=5e6, tuned_ns=1e6, ratio=5.0, spread=0.1, pairs=7,
           original_temp=2**20, tuned_temp=2**21, difference=1e-7)  # fmt: skip
    f = auto_layout(conv)
    f(X, K)
    told = f.explain(X, K)
    assert told.saved_ns == 4e6 and told.nothing_gained == ""
    assert told.break_even == math.ceil(told.outcome.seconds * 1e9 / 4e6)
    for text in (str(told), told._repr_html_()):
        for words in ("5.00 → 1.00 ms", "5.00x ±0.10, 7 pairs", "1.0 MiB → 2.0 MiB", f"after {told.break_even} calls",
                      "1e-07", "optimal"):  # fmt: skip
            assert words in text, words
    assert repr(told).startswith("<Explanation of conv: kept: forced; 1 convolution")


def test_outputs_that_are_noise_are_told_as_such(forced, monkeypatch):
    judged(monkeypatch, difference=1e-7, noise=(1, 4, 5, 7, 8))
    told = auto_layout(conv).explain(X, K)
    words = "1e-07 of their rms at most, but for outputs 1, 4, 5 and 2 more: rounding arguments moves these as much"
    assert words in " ".join(shown(told, 200).split())
    assert told.to_json()["measured"]["noise"] == [1, 4, 5, 7, 8]


def test_provisional(forced):
    told = auto_layout(conv, on_miss="heuristic").explain(X, K)
    assert told.provisional and told.to_json()["provisional"]
    assert "provisional" in str(told) and all(one.measurement is None for one in told.sites[0].tried)
    assert "not measured" in str(told)


def test_stored_and_pinned_plans_have_the_times_too(forced):
    first = auto_layout(net)
    now = first.explain(X, K, D)
    stored = auto_layout(net).explain(X, K, D)
    assert (now.outcome.source, stored.outcome.source) == ("measured", "stored")
    assert stored.sites == now.sites and stored.moves == now.moves and stored.steps == now.steps
    pinned = auto_layout(net, plan=first.plan(X, K, D)).explain(X, K, D)
    assert pinned.outcome.source == "pinned" and pinned.sites == now.sites and pinned.moves == now.moves
    assert "pinned" in str(pinned)


def test_compiler_options_and_their_measurements(with_options):
    f = auto_layout(conv)
    f(X, K)
    told = f.explain(X, K)
    assert "xla_cpu_experimental_ynn_fusion_type=''" in str(told)
    assert told.to_json()["compiler_options"] == with_options
    assert len([one for one in told.sites[0].tried if one.measurement]) > 1


def test_relaxed_candidates(forced):
    x, k = jnp.ones((1, 64, 8, 8)), jnp.ones((64, 64, 3, 3))
    strict, relaxed = (auto_layout(conv, numerics=how).explain(x, k).sites[0] for how in ("strict", "relaxed"))
    names = {one.candidate.lowering for one in relaxed.tried}
    assert "winograd2" in names and "winograd2" not in {one.candidate.lowering for one in strict.tried}
    assert all(one.measurement for one in relaxed.tried)


def test_frozen(forced):
    told = auto_layout(lambda k, d, x: net(x, k, d)).freeze(K, D).explain(X)
    assert len(told.sites) == 3 and all(one.measurement for one in told.sites[0].tried)
    assert {move.shape for move in told.moves} == {X.shape}  # the kernels are converted once
    assert len(told.moves) == len(told.outcome.plan.conversions)


def test_symbolic_shapes(forced):
    (b,) = jax.export.symbolic_shape("b")
    told = auto_layout(conv).explain(jax.ShapeDtypeStruct((b, *X.shape[1:]), X.dtype), K)
    assert "symbolic" in told.nothing_gained and told.sites == ()
    json.dumps(told.to_json())


# Text, HTML, JSON


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("name", PROGRAMS)
def test_in_a_terminal(forced, name, width):
    f, args = PROGRAMS[name]
    told = auto_layout(f).explain(*args)
    text = shown(told, width)
    assert max(map(len, text.splitlines())) <= width
    for site in told.sites:
        assert f"test_report.py:{site.line.split(':')[1]}" in text.replace("\n", "")
        assert str(site.chosen.candidate) in text
    assert "Convolutions" in text and "Conversions" in text
    assert shown(told.sites[0], width).count("xla:") >= 2


def test_names_are_no_markup(forced):
    def f(x, k):
        with jax.named_scope("[red]<b>"):
            return conv(x, k)

    f.__name__ = "<script>alert('[bold]')</script>"
    told = auto_layout(f).explain(X, K)
    assert "[red]<b>" in str(told.sites[0])
    text = told._repr_html_()
    assert "&lt;script&gt;alert" in text
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    closed = []
    parser.handle_endtag = closed.append
    parser.feed(text)
    assert Counter(tags) - Counter({"br": tags.count("br")}) == Counter(closed)
    assert set(tags) <= {
        "div",
        "style",
        "table",
        "tr",
        "th",
        "td",
        "code",
        "span",
        "br",
        "b",
        "p",
        "details",
        "summary",
    }


@pytest.mark.parametrize("name", PROGRAMS)
def test_json(forced, name):
    f, args = PROGRAMS[name]
    data = auto_layout(f).explain(*args).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    documented = Explanation.to_json.__doc__ or ""

    def keys(value):
        if isinstance(value, dict):
            yield from value
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from keys(one)

    assert all(key in documented for key in keys({**data, "compiler_options": {}}))
    for site in data["convolutions"]:
        assert sum(one["chosen"] for one in site["candidates"]) == 1
        assert {"median_ns", "spread_ns", "runs", "error", "status"} <= site["candidates"][0].keys()
    for i, one in enumerate(data["graph"]):
        assert all(j < i for j in one["inputs"])


# Pictures


def marks(figure, kind):
    return sum(line.get_gid() == kind for line in figure.axes[0].lines)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_graph_is_drawn(forced, name):
    f, args = PROGRAMS[name]
    told = auto_layout(f).explain(*args)
    figure = told.plot_graph()
    counts = Counter(one.kind for one in told.steps)
    assert counts["convolution"] == len(told.sites) and counts["conversion"]
    assert {kind: marks(figure, kind) for kind in counts} == counts
    figure.savefig(io.BytesIO(), format="png")
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) > len(told.steps)
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    page = figure.bbox
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)


def test_steps_of_a_residual_block(forced):
    told = auto_layout(lambda x, k: jax.nn.relu(conv(jnp.tanh(conv(x, k)), k) + x) * 2).explain(X, K)
    assert [(one.kind, one.inputs) for one in told.steps if one.kind != "conversion"] == [
        ("argument", ()),
        ("convolution", (1,)),
        ("convolution", (2,)),
        ("join", (0, 4)),
        ("result", (5,)),
    ]


def chain(*inputs):
    return [Step(kind="join", label="", inputs=one, order="") for one in inputs]


def test_a_column_for_each_branch():
    found = lanes(chain((), (0,), (1,), (0, 2), (3,)))
    assert found.lane == [0, 1, 1, 0, 0] and found.cut == {}
    many = chain((), (0,), (1,), (2,), (3,), (4, 3, 2, 1, 0))
    assert lanes(many).count == 5 and lanes(many).cut == {}
    few = lanes(many, most=3)
    assert few.count == 3 and set(few.cut) == {5} and len(few.cut[5]) == 2


def test_costs_are_drawn(forced):
    site = auto_layout(net).explain(X, K, D).sites[1]
    told = auto_layout(net).explain(X, K, D)
    figure = told.plot_costs(1)
    heat = figure.axes[0]
    assert len(heat.patches) == len(site.tried) + 2 and len(heat.texts) == len(site.tried)  # chosen and written
    assert {text.get_text() for text in heat.get_yticklabels()} == {one.candidate.lowering for one in site.tried}
    figure.savefig(io.BytesIO(), format="png")
    unknown = auto_layout(conv, on_miss="heuristic", table=":memory:").explain(X, K).plot_costs(0)
    assert {text.get_text() for text in unknown.axes[0].texts} == {"not measured"}


def test_predicted_and_measured_are_drawn(forced, monkeypatch):
    judged(monkeypatch, original_ns=5e6, tuned_ns=1e6)
    told = auto_layout(net).explain(X, K, D)
    whole, convolutions = told.plot_predicted().axes
    assert len(whole.patches) == 4 and len(convolutions.patches) == 2 * 2  # two distinct ones
    assert {"5.00", "1.00"} <= {text.get_text() for text in whole.texts}
    told.plot_predicted().savefig(io.BytesIO(), format="png")


def test_pictures_of_nothing():
    told = auto_layout(lambda x: x @ x).explain(X[0, 0])
    for figure in (told.plot_graph(), told.plot_predicted()):
        figure.savefig(io.BytesIO(), format="png")
    assert any("no convolution" in text.get_text() for text in told.plot_graph().axes[0].texts)


def test_without_matplotlib(forced, monkeypatch):
    told = auto_layout(conv).explain(X, K)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "jaxlayout.report.plots")
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'jaxlayout\[plots\]'"):
        told.plot_graph()
    assert "Convolutions" in str(told)
