"""`auto_layout` is `jax.jit` to its users, whatever they do with it.

Values are held against plain JAX, on functions that the made-up costs of `forced` do change: `same` and `is_tuned`
say so, since comparing a function with itself proves nothing.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import weakref
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PARAMS, K, X, close, conv, is_tuned, net, normal, same
from jax.experimental.layout import Format, Layout

import jaxlayout
from jaxlayout import AutoLayout, Options, auto_layout
from jaxlayout.api import tuner
from jaxlayout.convs.primitive import tuned_conv_p
from jaxlayout.graph.program import equations

pytestmark = pytest.mark.usefixtures("forced")


# Forms


def test_bare():
    @auto_layout
    def f(params, x):
        """Says what it does."""
        return net(params, x)

    assert isinstance(f, AutoLayout)
    close(f(PARAMS, X), net(PARAMS, X))
    assert f.outcome(PARAMS, X).kept
    assert (f.__name__, f.__doc__, f.__module__) == ("f", "Says what it does.", __name__)
    assert f.__qualname__ == "test_bare.<locals>.f"
    assert f.__wrapped__(PARAMS, X).shape == (2, 4, 6, 5)
    assert repr(f) == f"auto_layout({f.__wrapped__!r})"
    assert list(inspect.signature(f).parameters) == ["params", "x"]


def test_with_arguments():
    @auto_layout(static_argnames="scale", numerics="relaxed")
    def f(params, x, scale):
        return net(params, x) * (scale if scale > 1 else 1)

    close(f(PARAMS, X, scale=3), net(PARAMS, X) * 3)
    assert f.outcome(PARAMS, X, scale=3).kept
    assert f.options.numerics == "relaxed"


def test_over_what_has_no_name():
    class Callable:
        def __call__(self, x):
            return conv(x, K)

    for fun in (partial(net, PARAMS), Callable(), partial(jax.jit(net), PARAMS)):
        tuned = auto_layout(fun)
        close(tuned(X), fun(X))
        assert tuned.outcome(X).kept
        assert repr(tuned).startswith("auto_layout(")


def test_attributes_of_the_function_do_not_hide_methods():
    def f(x):
        return conv(x, K)

    f.plan = f.options = f._entry = f.trace = None  # type: ignore[attr-defined]
    close(auto_layout(f)(X), conv(X, K))
    assert not auto_layout(f).plan(X).trivial


def test_over_what_is_no_function():
    with pytest.raises(TypeError, match="3 is not a function"):
        auto_layout(3)


def test_over_auto_layout_keeps_what_it_was_told():
    once = auto_layout(lambda x, n: conv(x, K) * n, static_argnums=1, memory_limit=500.0)
    twice = auto_layout(once, time_budget=7.0)
    assert twice.__wrapped__ is once.__wrapped__
    assert (twice.options.memory_limit, twice.options.time_budget) == (500.0, 7.0)
    close(twice(X, 3), once(X, 3))
    plan = once.plan(X, 3)
    assert auto_layout(auto_layout(once, plan=plan)).outcome(X, 3).source == "pinned"


def test_copies_are_the_function():
    f = auto_layout(net)
    assert copy.copy(f) is f and copy.deepcopy({"f": f})["f"] is f
    assert {f: 1}[f] == 1


def test_it_is_collected():
    class Big:
        pass

    big = Big()
    seen = []
    ref = weakref.ref(big, seen.append)
    f = auto_layout(lambda x, big=big: conv(x, K))
    f(X)
    del f, big
    gc.collect()
    assert ref() is None


# Keywords of jax.jit

DEVICE = jax.devices()[0]
ONE = jax.sharding.SingleDeviceSharding(DEVICE)
JIT_KEYWORDS: dict[str, Any] = {
    "in_shardings": ONE,
    "out_shardings": ONE,
    "static_argnums": 2,
    "static_argnames": "n",
    "donate_argnums": (1,),
    "donate_argnames": "x",
    "keep_unused": True,
    "device": DEVICE,
    "backend": "cpu",
    "inline": True,
    "compiler_options": {"xla_embed_ir_in_executable": True},
}


@pytest.mark.parametrize("name", tuple(inspect.signature(jax.jit).parameters)[1:])
@pytest.mark.parametrize("over", ["function", "jitted"])
@pytest.mark.filterwarnings("ignore:backend and device argument on jit is deprecated:DeprecationWarning")
def test_every_keyword_of_jit(name, over):
    def f(params, x, n):
        return conv(net(params, x), normal(9, 3, 4, 3, 3)) * n  # of the shape of x, which may be donated

    keywords = {name: JIT_KEYWORDS[name]}  # a KeyError here: jit has a new keyword
    tuned = auto_layout(f, **keywords) if over == "function" else auto_layout(jax.jit(f, **keywords))
    close(tuned(PARAMS, X.copy(), 2.0), jax.jit(f, **keywords)(PARAMS, X.copy(), 2.0))
    assert tuned.outcome(PARAMS, X, 2.0).kept
    assert is_tuned(partial(tuned, PARAMS), X, 2.0)


def test_unknown_keyword():
    with pytest.raises(TypeError, match=r"unknown keyword nonsense, static; .*time_budget.*static_argnums"):
        auto_layout(net, nonsense=1, static=2)


def test_jit_keyword_over_what_is_jitted():
    for jitted in (jax.jit(net), auto_layout(net)):
        with pytest.raises(TypeError, match="donate_argnums"):
            auto_layout(jitted, donate_argnums=1)
        assert auto_layout(jitted, verdict=False)(PARAMS, X).shape == (2, 4, 6, 5)


def pairs(fun: Any, **keywords: Any) -> list[Any]:
    """Both ways of giving jit's keywords."""
    return [auto_layout(fun, **keywords), auto_layout(jax.jit(fun, **keywords))]


@pytest.mark.parametrize("how", [{"static_argnums": (1, -1)}, {"static_argnames": ("flags", "n")}])
def test_static_arguments(how):
    def f(x, flags, k, n):
        assert isinstance(flags, tuple) and isinstance(n, int)
        return conv(x, k) * n if flags[0] else x

    for tuned in pairs(f, **how):
        close(tuned(X, (True, "a"), K, 3), conv(X, K) * 3)
        close(tuned(X, (True, "a"), K, 4), conv(X, K) * 4)
        close(tuned(X, (False,), K, 4), X)
        close(tuned(X, flags=(True,), k=K, n=5), conv(X, K) * 5) if "static_argnames" in how else None
        assert tuned.outcome(X, (True, "a"), K, 4).kept
        assert not tuned.outcome(X, (False,), K, 4).kept
        with pytest.raises(ValueError, match=r"[Nn]on-hashable static"):
            tuned(X, [True], K, 3)


@pytest.mark.parametrize("how", [{"donate_argnums": (0,)}, {"donate_argnames": ("x",)}])
def test_donated_arguments(how):
    def f(x, k):
        return conv(x, k)

    k = normal(3, 3, 3, 3, 3)
    for tuned in pairs(f, **how):
        expected = conv(X, k)
        for _ in range(2):  # the call that tunes, and a warm one
            x = X.copy()
            close(tuned(x, k), expected)
            assert x.is_deleted() and not k.is_deleted()
        assert tuned.outcome(X, k).kept
        assert tuned.lower(X, k).donate_argnums == (0,)
        assert tuned.outcome(x, k).kept  # its shape is still to be seen
        assert not X.is_deleted()


def test_unused_arguments_are_kept_or_not():
    def f(x, unused):
        return conv(x, K)

    for keep in (True, False):
        for tuned in pairs(f, keep_unused=keep):
            close(tuned(X, X), conv(X, K))
            assert tuned.outcome(X, X).kept
            lowered = tuned.lower(X, X).as_text()
            assert lowered.count(f"tensor<{'x'.join(map(str, X.shape))}xf32>", 0, lowered.index("->")) == 1 + keep


def test_compiler_options_arrive():
    def f(x):
        return conv(x, K)

    for tuned in pairs(f, compiler_options={"no_such_option": 1}):
        with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
            tuned(X)
    for tuned in pairs(f, compiler_options={"xla_cpu_enable_fast_math": False}):
        close(tuned(X), conv(X, K))
        close(jax.jit(partial(tuned))(X), conv(X, K))  # where plain jit refuses


def test_inlined():
    def calls(f):  # as the equation of a call, or none
        return [eqn.params["inline"] for eqn in jax.make_jaxpr(f)(X).eqns if "inline" in eqn.params]

    def f(x):
        return conv(x, K)

    for inline in (True, False):
        for tuned in pairs(f, inline=inline):
            assert calls(tuned) == calls(jax.jit(f, inline=inline))


def test_physical_formats():
    format_ = Format(Layout(major_to_minor=(0, 2, 3, 1)), ONE)
    for tuned in pairs(lambda x, k: conv(x, k), in_shardings=(format_, None), out_shardings=format_):
        x = jax.device_put(X, format_)
        out = tuned(x, K)
        close(out, conv(X, K))
        assert out.format.layout.major_to_minor == (0, 2, 3, 1)
        assert tuned.outcome(x, K).kept


# A function jitted already


def test_what_a_jitted_function_was_told_is_found_without_running_or_tracing_it():
    calls = []

    def f(x, n):
        calls.append(n)
        jax.debug.callback(lambda: calls.append("run"))
        return conv(x, K) * n

    tuned = auto_layout(jax.jit(f, static_argnums=1))
    assert calls == []
    tuned(X, 2)
    jax.effects_barrier()
    assert calls == [2, "run"]
    tuned(X, 2)
    jax.effects_barrier()
    assert calls == [2, "run", "run"]


def test_a_jax_that_does_not_tell(monkeypatch):
    monkeypatch.setattr("jaxlayout.api.wrapped.jit_info", lambda jitted: jaxlayout.runtime._compat.jit_info(object()))
    with pytest.raises(TypeError, match="decorate the function itself"):
        auto_layout(jax.jit(net))


def test_jitted_methods_are_no_jitted_functions():
    class Model:
        def __init__(self, kernel):
            self.kernel = kernel

        @partial(jax.jit, static_argnums=0)
        def __call__(self, x):
            return conv(x, self.kernel)

    model = Model(K)
    close(auto_layout(model.__call__)(X), conv(X, K))
    close(auto_layout(model)(X), conv(X, K))
    assert auto_layout(model.__call__).outcome(X).kept


def test_wrappers_of_jitted_functions_are_no_jitted_functions():
    @functools.wraps(inner := jax.jit(net))
    def outer(params, x):
        return inner(params, x) + 1

    close(auto_layout(outer)(PARAMS, X), net(PARAMS, X) + 1)


# Arguments and results


def test_method_with_static_self():
    class Model:
        def __init__(self, scale):
            self.scale = scale

        @partial(auto_layout, static_argnums=0)
        def predict(self, params, x, *, plus=0.0):
            return net(params, x) * self.scale + plus

    one, two = Model(1.0), Model(2.0)
    for model in (one, two):
        close(model.predict(PARAMS, X, plus=1.0), net(PARAMS, X) * model.scale + 1.0)
    assert Model.predict.outcome(one, PARAMS, X).kept
    assert isinstance(Model.predict, AutoLayout)


def test_method_of_a_pytree():
    class Model(NamedTuple):
        kernel: Any
        bias: Any

        @auto_layout
        def __call__(self, x):
            return net({"kernel": self.kernel, "bias": self.bias}, x)

    model = Model(**PARAMS)
    close(model(X), net(PARAMS, X))
    assert Model.__call__.outcome(model, X).kept
    grads = jax.grad(lambda model: model(X).sum())(model)
    close(grads.kernel, jax.grad(lambda p: net(p, X).sum())(PARAMS)["kernel"])


def test_pytrees_in_and_out():
    class Both(NamedTuple):
        a: Any
        b: Any

    def f(tree, *more, **named):
        y = conv(tree["x"][0], named["k"])
        return Both(a=(y, None), b={"z": [more[0] + 1, ()], "none": None, "x": tree["x"][0]})

    same(f, {"x": [X, None], "empty": {}}, normal(4, 3), None, k=K)


def test_trees_that_check_their_leaves():
    """As dataclasses with assertions do: they never see anything but arrays and tracers, as under jit."""

    @jax.tree_util.register_pytree_node_class
    class Picky:
        def __init__(self, x):
            assert isinstance(x, jax.Array) and x.ndim == 4
            self.x = x

        def tree_flatten(self):
            return (self.x,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    same(lambda picky: Picky(conv(picky.x, K)), Picky(X))


def test_keywords_in_any_order():
    def f(*, a, b, c=1.0):
        return conv(a, b) * c

    tuned = same(f, a=X, b=K)
    close(tuned(b=K, a=X, c=2.0), conv(X, K) * 2.0)
    assert tuned.outcome(c=2.0, b=K, a=X).kept


def test_python_scalars_stay_weak():
    def f(x, k, a, b, c):
        return conv(x, k) * a, a, b + 1, c, jnp.float16(1) * a

    same(f, X, K, 2.0, 3, True)
    same(f, X, K, np.float32(2.0), np.int8(3), np.array(True))
    same(f, X.astype(jnp.bfloat16), K.astype(jnp.bfloat16), 2, 3, False)


def test_numpy_and_wide_arguments():
    same(conv, np.asarray(X), np.asarray(K, np.float64).astype(np.float32))
    same(lambda x, k, n: (conv(x, k), n), X, K, np.arange(3))


def test_keys_in_and_out():
    def f(x, keys):
        noise = jax.random.key_data(keys[0]).sum() % 7
        return conv(x + noise, K), jnp.stack([keys[1], keys[0]]), keys[:, None], keys

    tuned = same(f, X, jax.random.split(jax.random.key(3), 2))
    keys = jax.random.split(jax.random.key(3, impl="rbg"), 2)  # of another type: traced and tuned anew
    close(tuned(X, keys)[2:], (keys[:, None], keys))


def test_results_that_are_arguments_or_constants():
    same(lambda x, k: (x, conv(x, k), x, 1, np.arange(3), jnp.zeros(2), x.shape), X, K)


def test_no_arguments():
    same(lambda: conv(X, K))


def test_nothing_to_tune():
    f = auto_layout(lambda x: jnp.sin(x) + 1)
    close(f(X), jnp.sin(X) + 1)
    assert not f.outcome(X).kept and f.outcome(X).verdict.reason == "it has no convolution"
    assert "no convolution" in str(f.explain(X))


def test_empty_arrays():
    f = auto_layout(lambda x, k: conv(x, k) + 1)
    close(f(X[:0], K), conv(X[:0], K) + 1)
    close(f(X[:, :, :0], K), conv(X[:, :, :0], K) + 1)
    close(f(X, K[:0]), conv(X, K[:0]) + 1)


def test_closed_over_arrays():
    same(lambda x: net(PARAMS, x), X)
    kernel = np.asarray(K)
    same(lambda x: conv(x, kernel), X)


def test_errors_of_the_function_are_its_own():
    def f(x):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        auto_layout(f)(X)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        auto_layout(net)(PARAMS)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        auto_layout(lambda x: x if x.sum() > 0 else -x)(X)
    with pytest.raises(TypeError, match=r"valid JAX"):
        auto_layout(lambda x: "text")(X)
    f = auto_layout(net)
    with pytest.raises(TypeError, match="lhs and rhs ndim to be equal"):
        f(PARAMS, X[0])
    close(f(PARAMS, X), net(PARAMS, X))  # and does it no lasting harm


# What the judge is handed


@pytest.fixture
def given(monkeypatch):
    """What each tuning was given to judge on."""
    calls = []
    real = tuner.decide

    def decide(request):
        calls.append(args := request.args)
        if args is not None:
            assert [(x.shape, x.dtype) for x in args] == [(a.shape, a.dtype) for a in request.jaxpr.in_avals]
            assert all(isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) for x in args)
        return real(request)

    monkeypatch.setattr(tuner, "decide", decide)
    return calls


def handed(given: list[Any]) -> list[Any]:
    (args,) = given
    return [np.asarray(x).tolist() if x.size == 1 else x for x in args]


def test_concrete_arguments_between_static_ones(given):
    def f(a, n, b, flag, x, shape, c, *, d, mode, e):
        return conv(x, K) * a * b * c * d * e * n

    tuned = auto_layout(f, static_argnums=(1, 3, 5), static_argnames="mode")
    # The static ones look just like the dynamic ones beside them.
    tuned(2.0, 5, 3.0, 7.0, X, (11, 13.0), 17.0, d=19.0, mode=23.0, e=29.0)
    a, b, x, c, d, e = handed(given)
    assert (a, b, c, d, e) == (2.0, 3.0, 17.0, 19.0, 29.0) and x is X


def test_concrete_arguments_in_trees_with_static_parts(given):
    @jax.tree_util.register_pytree_node_class
    class Tree:
        def __init__(self, a, n, b):
            self.a, self.n, self.b = a, n, b

        def tree_flatten(self):
            return (self.b, self.a), self.n

        @classmethod
        def tree_unflatten(cls, n, children):
            return cls(children[1], n, children[0])

    tuned = auto_layout(lambda tree, none, x: conv(x, K) * tree.a - tree.b + tree.n)
    close(tuned(Tree(2.0, 5.0, 3.0), None, X), conv(X, K) * 2.0 - 3.0 + 5.0)
    b, a, x = handed(given)
    assert (a, b) == (2.0, 3.0) and x is X


def test_concrete_arguments_by_name_and_position(given):
    tuned = auto_layout(lambda x, n, scale: conv(x, K) * scale * n, static_argnames=("n",))
    tuned(X, scale=3.0, n=2)
    assert handed(given) == [X, 3.0] or handed(given)[1] == 3.0


def test_unused_arguments_are_handed_on_too(given):
    auto_layout(lambda unused, x: conv(x, K))(1.5, X)
    assert handed(given)[0] == 1.5


def test_keys_are_handed_on(given):
    auto_layout(lambda key, x: conv(x + jax.random.normal(key), K))(jax.random.key(7), X)
    ((key, _),) = given
    assert key == jax.random.key(7)


@pytest.mark.parametrize(
    "call",
    [
        lambda f: jax.grad(lambda x: f(x, 2.0).sum())(X),
        lambda f: jax.vmap(lambda x: f(x, 2.0))(X[None]),
        lambda f: jax.jvp(lambda s: f(X, s), (2.0,), (1.0,)),
        lambda f: f.lower(X, 2.0),
        lambda f: f.trace(jax.ShapeDtypeStruct(X.shape, X.dtype), 2.0),
        lambda f: f.outcome(jax.ShapeDtypeStruct(X.shape, X.dtype), 2.0),
        lambda f: jax.jit(f)(X, 2.0),
        lambda f: jax.eval_shape(f, X, 2.0),
    ],
)
def test_there_is_nothing_to_hand_on_where_arguments_are_not_real(given, call):
    call(auto_layout(lambda x, s: conv(x, K) * s))
    assert given == [None]


def test_a_function_that_calls_itself_is_tuned_once_and_on_its_own_arguments(given):
    @partial(auto_layout, static_argnums=1)
    def f(x, n):
        return conv(x, normal(8, 3, 3, 3, 3)) if n == 0 else f(x[:, :, 1:], n - 1)

    f(X, 1)
    assert [args and args[0].shape for args in given] == [X.shape]


# Introspection


def test_trace_and_lower():
    f = auto_layout(net)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, X))
    traced = f.trace(*abstract)
    assert any(eqn.primitive is tuned_conv_p for eqn in equations(traced.jaxpr))
    assert traced.out_info.shape == (2, 4, 6, 5)
    close(f.trace(PARAMS, X).lower().compile()(PARAMS, X), net(PARAMS, X))
    close(f.lower(*abstract).compile()(PARAMS, X), net(PARAMS, X))
    assert "jit_net" in f.lower(PARAMS, X).as_text()
    assert jax.eval_shape(f, *abstract).shape == (2, 4, 6, 5)


def test_eval_shape_does_not_tune(forced):
    f = auto_layout(lambda x, n: conv(x, K) * n, static_argnums=1)
    assert f.eval_shape(X, 3).shape == (2, 4, 6, 5)
    assert forced == []


def test_clear_cache_forgets_no_plan(forced):
    traced = []
    f = auto_layout(lambda x: traced.append(1) or conv(x, K))
    f(X)
    asked = len(forced)
    f.clear_cache()
    f(X)
    assert len(traced) == 2 and len(forced) == asked


def test_plan_and_explain():
    f = auto_layout(net)
    plan = f.plan(PARAMS, X)
    assert not plan.trivial and jaxlayout.Plan.from_json(plan.to_json()) == plan
    shown = str(f.explain(PARAMS, X))
    assert shown.startswith("kept")
    for words in ("helpers.py", "xla:NCHW,OIHW->NCHW", "conversion of float32[2, 3, 6, 5]", "optimal"):
        assert words in shown, shown
    assert f.outcome(PARAMS, X).source == "stored"


def test_plan_before_the_first_call_is_the_plan_of_the_call(forced):
    f = auto_layout(net)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, X))
    assert f.outcome(*abstract).source == "measured"
    asked = len(forced)
    close(f(PARAMS, X), net(PARAMS, X))
    assert len(forced) == asked


# Options


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("policy", "channels_last", "channels_last"),
        ("policy", "off", "off"),
        ("on_miss", "heuristic", "heuristic"),
        ("time_budget", "12.5", 12.5),
        ("lock_timeout", "2.5", 2.5),
        ("memory_limit", "2", 2.0),
        ("numerics", "relaxed", "relaxed"),
        ("verdict", "off", False),
        ("verdict", "1", True),
        ("table", "/somewhere/else.sqlite", "/somewhere/else.sqlite"),
    ],
)
def test_options_and_their_variables(monkeypatch, name, text, value):
    default = Options()
    for variable in [f"JAXLAYOUT_{field.upper()}" for field in Options.__dataclass_fields__]:
        monkeypatch.delenv(variable, raising=False)
    assert auto_layout(net).options == default
    assert getattr(auto_layout(net, **{name: value}).options, name) == value
    monkeypatch.setenv(f"JAXLAYOUT_{name.upper()}", text)
    assert getattr(auto_layout(net).options, name) == value
    assert getattr(auto_layout(net, **{name: getattr(default, name)}).options, name) == getattr(default, name)
    monkeypatch.setenv(f"JAXLAYOUT_{name.upper()}", "")
    assert auto_layout(net).options == default


def test_every_option_is_tested():
    (mark,) = [m for m in test_options_and_their_variables.pytestmark if m.name == "parametrize"]
    assert {name for name, _, _ in mark.args[1]} == set(Options.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "channels_first"),
        ("on_miss", "guess"),
        ("time_budget", -1.0),
        ("time_budget", float("nan")),
        ("time_budget", "long"),
        ("lock_timeout", -1.0),
        ("lock_timeout", "soon"),
        ("memory_limit", 0.5),
        ("memory_limit", None),
        ("numerics", 3),
        ("verdict", "perhaps"),
        ("table", 3),
    ],
)
def test_bad_options(monkeypatch, name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        auto_layout(net, **{name: value})
    if isinstance(value, str | float) and name != "table":
        monkeypatch.setenv(f"JAXLAYOUT_{name.upper()}", str(value))
        with pytest.raises(ValueError, match=f"^JAXLAYOUT_{name.upper()}="):
            auto_layout(net)


def test_a_table_by_its_path(tmp_path, forced):
    path = tmp_path / "elsewhere" / "table.sqlite"
    auto_layout(net, table=path)(PARAMS, X)
    assert jaxlayout.CostTable(path).counts()["plans"] == 1
    asked = len(forced)
    auto_layout(net, table=str(path))(PARAMS, X)
    assert len(forced) == asked
    auto_layout(net, table=":memory:")(PARAMS, X)
    assert len(forced) == 2 * asked
