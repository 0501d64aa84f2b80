"""What can be done with `jax.jit(f)` can be done with `auto_layout(f)`, with the same end: held side by side.

The rows are enumerated from what `jax.jit(f)` has: an attribute or a keyword that no row compares fails the test.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, get_type_hints

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import K, X, close, conv, is_tuned, normal
from jax import lax
from jax.experimental import buffer_callback, io_callback, jet, roofline

import jaxlayout
from jaxlayout import Options, auto_layout
from jaxlayout.api import tuner
from jaxlayout.api.keywords import JitKeywords, Keywords, OptionKeywords
from jaxlayout.flax import linen as flax_linen
from jaxlayout.flax import nnx as flax_nnx
from jaxlayout.measure.turns import NoTurn

pytestmark = [
    pytest.mark.usefixtures("forced"),
    pytest.mark.filterwarnings("ignore:backend and device argument on jit is deprecated:DeprecationWarning"),
]

Wrap = Callable[..., Any]
"""`jax.jit` or `auto_layout`."""
KK = normal(1, 3, 3, 3, 3)
"""A kernel whose results are of the shape of its images."""


def over_jit(fun: Any, **keywords: Any) -> Any:
    return auto_layout(jax.jit(fun, **keywords))


def net(x: jax.Array, k: jax.Array, n: int = 1) -> jax.Array:
    """Says what it does."""
    return conv(x, k) * n


net.tag = "mine"  # type: ignore[attr-defined]
PARTIAL = partial(net, n=1)


def shown(error: BaseException) -> str:
    """The type and the words of an error, without what differs from run to run."""
    return re.sub(r"0x[0-9a-f]+|\d{9,}", "...", f"{type(error).__name__}: {error}")


# Attributes


def alike(name: str, jitted: Any, tuned: Any) -> None:
    assert getattr(tuned, name) == getattr(jitted, name)


def inherited(name: str, jitted: Any, tuned: Any) -> None:
    assert getattr(type(tuned), name) == getattr(type(jitted), name) == getattr(object, name)


def of_jax_alone(name: str, jitted: Any, tuned: Any) -> None:
    """How JAX makes its own; nothing that its documentation offers."""
    assert name.startswith("_") and hasattr(jitted, name)


def pickled(name: str, jitted: Any, tuned: Any) -> None:
    again = [cloudpickle.loads(cloudpickle.dumps(f)) for f in (jitted, tuned)]
    close(again[1](X, K), again[0](X, K))
    assert is_tuned(again[1], X, K)


def called(name: str, jitted: Any, tuned: Any) -> None:
    for args, kwargs in (((X, K), {}), ((X,), {"k": K}), ((), {"n": 3, "k": K, "x": X})):
        close(tuned(*args, **kwargs), jitted(*args, **kwargs))


def bound(name: str, jitted: Any, tuned: Any) -> None:
    class Images:
        by_jit, by_us = jitted, tuned

    assert Images.by_us is tuned and Images.by_jit is jitted
    assert inspect.ismethod(Images().by_us) and inspect.ismethod(Images().by_jit)
    assert Images().by_us.__func__ is tuned


def shows(name: str, jitted: Any, tuned: Any) -> None:
    assert repr(net) in getattr(jitted, name)() and repr(net) in getattr(tuned, name)()


def has_attributes(name: str, jitted: Any, tuned: Any) -> None:
    assert vars(tuned)["tag"] == vars(jitted)["tag"]
    for f in (jitted, tuned):
        f.another = 1
        assert f.another == 1 and not hasattr(net, "another")
        del f.another


def lowered(name: str, jitted: Any, tuned: Any) -> None:
    one, other = (getattr(f, name)(X, k=K) for f in (jitted, tuned))
    for attribute in ("fun_name", "in_tree", "out_tree", "args_info", "out_info", "donate_argnums"):
        assert hasattr(one, attribute) == hasattr(other, attribute)
        assert getattr(one, attribute, None) == getattr(other, attribute, None)
    if name == "trace":
        assert (
            other.jaxpr.debug_info == one.jaxpr.debug_info
        )  # the names of the function, its arguments and its results
        one, other = one.lower(), other.lower()
    assert other.as_text().split("{")[0] == one.as_text().split("{")[0]  # the name of the program
    close(other.compile()(X, k=K), one.compile()(X, k=K))


def evaluated(name: str, jitted: Any, tuned: Any) -> None:
    assert tuned.eval_shape(X, k=K) == jitted.eval_shape(X, k=K)


def cleared(name: str, jitted: Any, tuned: Any) -> None:
    for f in (jitted, tuned):
        assert f.clear_cache() is None
        assert f(X, K).shape == (2, 4, 6, 5)


ATTRIBUTES: dict[str, Callable[[str, Any, Any], None]] = {
    **dict.fromkeys(("__annotations__", "__doc__", "__module__", "__name__", "__qualname__"), alike),
    **dict.fromkeys(("__signature__", "__wrapped__", "tag"), alike),
    **dict.fromkeys(("__getstate__", "__reduce__", "__reduce_ex__", "__setstate__"), pickled),
    **dict.fromkeys(("__repr__", "__str__"), shows),
    **dict.fromkeys(("__class__", "__new__", "__init__", "__init_subclass__", "__subclasshook__"), of_jax_alone),
    **dict.fromkeys(("__vectorcalloffset__", "_cache_miss", "_cache_size", "_clear_cache"), of_jax_alone),
    **dict.fromkeys(("_fun", "_jit_info"), of_jax_alone),
    "__call__": called,
    "__dict__": has_attributes,
    "__get__": bound,
    "clear_cache": cleared,
    "eval_shape": evaluated,
    "lower": lowered,
    "trace": lowered,
}


@pytest.mark.parametrize("name", dir(jax.jit(net)))
def test_every_attribute(name):
    check = ATTRIBUTES.get(name, inherited if name in dir(object) else None)
    assert check is not None, f"jax.jit(f) has {name}: no row compares it with auto_layout(f)"
    check(name, jax.jit(net), auto_layout(net))
    check(name, jax.jit(PARTIAL), auto_layout(PARTIAL)) if check is alike and name != "tag" else None


def test_what_it_is_to_others():
    for f in (jax.jit(net), auto_layout(net)):
        assert isinstance(f, jax.stages.Wrapped) and callable(f)
        assert {f: 1}[f] == 1 and f != jax.jit(net)
        assert weakref.ref(f)() is f
        close(jax.jit(lambda f, x: f(x, K), static_argnums=0)(f, X), conv(X, K))
        assert inspect.signature(f) == inspect.signature(net) and inspect.unwrap(f) is net


def test_of_a_function_with_the_attributes_of_another():
    """As JAX gives them to what it makes of one: `jax.grad(f)` has all that `f` has."""
    inner = auto_layout(lambda x: (conv(x, K) ** 2).sum())
    others = [functools.wraps(f)(lambda x: 3 * x) for f in (inner, jax.jit(net))]
    for fun in (jax.grad(inner), *others):
        close(auto_layout(fun)(X), jax.jit(fun)(X))


def test_nothing_of_it_stays():
    def refs(wrap: Wrap) -> list[Any]:
        held = jnp.ones(3)
        f = wrap(lambda x, held=held: conv(x, K) + held.sum())
        f(X), jax.jit(f)(X), jax.grad(lambda x: f(x).sum())(X)
        return [weakref.ref(f), weakref.ref(held)]

    for wrap in (jax.jit, auto_layout):
        found = refs(wrap)
        gc.collect()
        assert [ref() for ref in found] == [None, None]


def test_arguments_of_any_name():
    def f(self, fun, args, x, k):
        return conv(x, k) * self + fun - args

    named = {"self": 2.0, "fun": 3.0, "args": 4.0, "x": X, "k": K}
    tuned, wanted = auto_layout(f), jax.jit(f)(**named)
    close(tuned(**named), wanted)
    for made in (tuned.lower(**named), tuned.trace(**named)):
        assert made.out_info.shape == wanted.shape
    assert tuned.eval_shape(**named).shape == wanted.shape
    assert tuned.plan(**named) == tuned.outcome(**named).plan and tuned.explain(**named).sites
    close(tuned.freeze(k=K, self=2.0)(**{name: named[name] for name in ("fun", "args", "x")}), wanted)
    close(auto_layout(lambda x, k, **more: conv(x, k) * more["self"])(X, K, self=2.0), 2.0 * conv(X, K))


@pytest.mark.parametrize("wrap", [jax.jit, auto_layout])
def test_what_cannot_be_referred_to_weakly_is_refused(wrap):
    class Slotted:
        __slots__ = ()

        def __call__(self, x):
            return x

    with pytest.raises(TypeError, match="cannot create weak reference"):
        wrap(Slotted())(X)


# Keywords

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def values_of_static(wrap: Wrap, **how: Any) -> Any:
    seen: list[Any] = []

    def f(x: Any, n: Any) -> Any:
        seen.append(n)
        return conv(x, KK) * len(n)

    g = wrap(f, **how)
    return [g(X, "a"), g(X, "bc"), g(X, "a"), str(seen)], [] if "static_argnums" in how else g(X, n="def")


def after_donation(wrap: Wrap, **how: Any) -> Any:
    f, x = wrap(lambda x, k: conv(x, k), **how), X.copy()
    return [f(x, KK), x.is_deleted(), KK.is_deleted(), f.lower(X, KK).donate_argnums]


def arguments_kept(wrap: Wrap, keep: bool) -> Any:
    text = wrap(lambda x, unused: conv(x, KK), keep_unused=keep).lower(X, 1.0).as_text()
    return re.findall(r"%arg\d+", text[: text.index("->")])


KEYWORDS: dict[str, Callable[[Wrap], Any]] = {
    "fun": lambda wrap: wrap(net)(X, K),
    "in_shardings": lambda wrap: (
        wrap(conv, in_shardings=(ONE, None)).lower(X, K).compile().input_shardings,
        wrap(conv, in_shardings=(ONE, None))(X, K),
    ),
    "out_shardings": lambda wrap: wrap(lambda x, k: [conv(x, k)], out_shardings=[ONE])(X, K)[0].sharding,
    "static_argnums": lambda wrap: values_of_static(wrap, static_argnums=1),
    "static_argnames": lambda wrap: values_of_static(wrap, static_argnames="n"),
    "donate_argnums": lambda wrap: after_donation(wrap, donate_argnums=0),
    "donate_argnames": lambda wrap: after_donation(wrap, donate_argnames="x"),
    "keep_unused": lambda wrap: [arguments_kept(wrap, keep) for keep in (True, False)],
    "device": lambda wrap: wrap(conv, device=jax.devices()[0])(X, K).devices(),
    "backend": lambda wrap: wrap(conv, backend="cpu")(X, K).devices(),
    "inline": lambda wrap: [
        [eqn.params.get("inline") for eqn in jax.make_jaxpr(wrap(lambda x: x + 1, inline=inline))(X).eqns]
        for inline in (True, False)
    ],
    "compiler_options": lambda wrap: ends(lambda: wrap(conv, compiler_options={"no_such_option": 1})(X, K)),
}


def ends(run: Callable[[], Any]) -> str:
    """How a call ends."""
    try:
        run()
    except Exception as error:
        return shown(error)
    return "well"


def test_editors_know_every_keyword():
    assert get_type_hints(OptionKeywords) == get_type_hints(Options)
    assert JitKeywords.__annotations__.keys() == inspect.signature(jax.jit).parameters.keys() - {"fun"}
    assert Keywords.__annotations__.keys() == OptionKeywords.__annotations__.keys() | JitKeywords.__annotations__.keys()


@pytest.mark.parametrize("name", inspect.signature(jax.jit).parameters)
@pytest.mark.parametrize("wrap", [auto_layout, over_jit])
def test_every_keyword(name, wrap):
    assert name in KEYWORDS, f"jax.jit takes {name}: no row compares it with auto_layout's"
    found, expected = (jax.tree.leaves(KEYWORDS[name](how)) for how in (wrap, jax.jit))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        close(a, b) if isinstance(b, jax.Array) else None
        assert isinstance(b, jax.Array) or a == b


# Errors

LEAKED: list[Any] = []


def branches(x: Any, k: Any) -> Any:
    return x if x.sum() > 0 else conv(x, k)


def branches_on_a_leaf(tree: Any, *, k: Any) -> Any:
    return conv(tree["a"][0], k) if tree["a"][1].sum() else tree


def leaks(x: Any, k: Any) -> Any:
    LEAKED.append(x * 2)
    return conv(x, k)


def uses_a_leak(x: Any, k: Any) -> Any:
    return conv(x, k) + LEAKED[0]


class Branches:
    def __call__(self, x: Any, k: Any) -> Any:
        return branches(x, k)

    def method(self, x: Any, k: Any) -> Any:
        return branches(x, k)


def twice_donated(f: Any) -> Any:
    x = X.copy()
    return f(x, KK), f(x, KK)


def deleted(f: Any) -> Any:
    x = X.copy()
    x.delete()
    return f(x, KK)


def with_(context: Any, f: Any, *args: Any) -> Any:
    with context:
        return f(*args)


def looked_for(f: Any) -> Any:
    LEAKED.clear()
    return with_(jax.checking_leaks(), f, X, K)


ERRORS: dict[str, tuple[Any, dict[str, Any], Callable[[Any], Any]]] = {
    "no array": (net, {}, lambda f: f("text", K)),
    "no array by name": (net, {}, lambda f: f(X, k="text")),
    "no array in a tree": (branches_on_a_leaf, {}, lambda f: f({"a": [X, object]}, k=K)),
    "no array to a partial function": (partial(net, X), {}, lambda f: f("text")),
    "no array to an object": (Branches(), {}, lambda f: f(X, "text")),
    "an array of objects": (net, {}, lambda f: f(np.array([object()]), K)),
    "a shape for an array": (net, {}, lambda f: f(jax.ShapeDtypeStruct(X.shape, X.dtype), K)),
    "no array to lower": (net, {}, lambda f: f.lower("text", K)),
    "a branch": (branches, {}, lambda f: f(X, K)),
    "a branch in a lambda": (lambda x, k: branches(x, k), {}, lambda f: f(X, K)),
    "a branch in a partial function": (partial(branches, k=K), {}, lambda f: f(X)),
    "a branch in an object": (Branches(), {}, lambda f: f(X, K)),
    "a branch in a method": (Branches().method, {}, lambda f: f(X, K)),
    "a branch in a wrapper": (functools.wraps(branches)(lambda *a: branches(*a)), {}, lambda f: f(X, K)),
    "a branch on a leaf": (branches_on_a_leaf, {}, lambda f: f({"a": [X, X]}, k=K)),
    "a branch, traced": (branches, {}, lambda f: f.trace(X, K)),
    "a branch, lowered": (branches, {}, lambda f: f.lower(X, K)),
    "a branch, its shape": (branches, {}, lambda f: f.eval_shape(X, K)),
    "a branch under jit": (branches, {}, lambda f: jax.jit(lambda x: f(x, K))(X)),
    "a branch under grad": (branches, {}, lambda f: jax.grad(lambda x: f(x, K).sum())(X)),
    "a branch under vmap": (branches, {}, lambda f: jax.vmap(f, (0, None))(X[None], K)),
    "a NumPy array of a tracer": (lambda x, k: np.asarray(conv(x, k)), {}, lambda f: f(X, K)),
    "an index": (lambda x: [1, 2][x.sum().astype(int)], {}, lambda f: f(X)),
    "an integer": (lambda x: x[: int(x.sum())], {}, lambda f: f(X)),
    "a shape": (lambda x: jnp.ones(x.sum().astype(int)), {}, lambda f: f(X)),
    "a leaked tracer": (uses_a_leak, {}, lambda f: (LEAKED or jax.jit(leaks)(X, KK), f(X, KK))),
    "a leak, looked for": (
        lambda x, k: leaks(x, k),
        {},
        lambda f: (LEAKED.clear(), with_(jax.checking_leaks(), f, X, K)),
    ),
    "shapes that do not fit": (lambda x, k: conv(x, k) + jnp.ones(7), {}, lambda f: f(X, K)),
    "too few axes": (net, {}, lambda f: f(X[0], K)),
    "a result that is no array": (lambda x, k: {"y": (conv(x, k), "text")}, {}, lambda f: f(X, K)),
    "too few arguments": (net, {}, lambda f: f(X)),
    "too many arguments": (net, {}, lambda f: f(X, K, 1, 2)),
    "an unknown argument": (net, {}, lambda f: f(X, K, m=1)),
    "static and not hashable": (net, {"static_argnames": "n"}, lambda f: f(X, K, n=[1])),
    "static and not hashable by number": (net, {"static_argnums": 2}, lambda f: f(X, K, [1])),
    "a static array": (net, {"static_argnums": 1}, lambda f: f(X, K)),
    "a static argument missing": (net, {"static_argnums": 1}, lambda f: f(X)),
    "static out of range": (net, {"static_argnums": 7}, lambda f: f(X, K)),
    "static by an unknown name": (net, {"static_argnames": "m"}, lambda f: f(X, K)),
    "donated out of range": (net, {"donate_argnums": 7}, lambda f: f(X, K)),
    "donated twice": (lambda x, k: conv(x, k), {"donate_argnums": 0}, twice_donated),
    "deleted": (lambda x, k: conv(x, k), {}, deleted),
    "shardings that do not fit": (net, {"in_shardings": (ONE,) * 5}, lambda f: f(X, K)),
    "shardings of results that do not fit": (net, {"out_shardings": (ONE,) * 2}, lambda f: f(X, K)),
    "not a number": (lambda x: jnp.log(-jnp.abs(x)), {}, lambda f: with_(jax.debug_nans(True), f, X)),
    "strict promotion": (
        lambda x: x + jnp.ones(5, int),
        {},
        lambda f: with_(jax.numpy_dtype_promotion("strict"), f, X),
    ),
    "no rank promotion": (lambda x: x + jnp.ones(5), {}, lambda f: with_(jax.numpy_rank_promotion("raise"), f, X)),
    "no gradient of an array": (net, {}, lambda f: jax.grad(f)(X, K)),
    "another tree for the compiled one": (net, {}, lambda f: f.lower(X, K).compile()(X, k=K)),
    "another shape for the compiled one": (net, {}, lambda f: f.lower(X, K).compile()(X[:1], K)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_every_error(name):
    fun, keywords, use = ERRORS[name]
    expected, found = (ends(lambda: use(wrap(fun, **keywords))) for wrap in (jax.jit, auto_layout))  # noqa: B023
    LEAKED.clear()
    assert expected != "well" and found == expected


def test_errors_of_a_frozen_function_name_it_too():
    f = auto_layout(lambda k, x: branches(x, k))
    assert ends(lambda: f.freeze(K)(X)) == ends(lambda: jax.jit(f.__wrapped__)(K, X))


# Tracing


def counted() -> tuple[Any, list[Any]]:
    seen: list[Any] = []

    def f(x: Any, k: Any = K, n: Any = 1) -> Any:
        seen.append((jax.typeof(x), jax.typeof(k), n if isinstance(n, int) else jax.typeof(n)))
        return conv(x, k) * n

    return f, seen


LOOKS: dict[str, Callable[[Any], Any]] = {
    "outcome": lambda f: f.outcome(X),
    "plan": lambda f: f.plan(X),
    "explain": lambda f: f.explain(X),
    "explain of shapes": lambda f: f.explain(jax.ShapeDtypeStruct(X.shape, X.dtype)),
    "tune": lambda f: jaxlayout.tune(f, X),
    "lower": lambda f: f.lower(X),
    "trace": lambda f: f.trace(X),
    "eval_shape": lambda f: f.eval_shape(X),
    "jit": lambda f: jax.jit(f)(X),
    "grad": lambda f: jax.grad(lambda x: f(x).sum())(X),
    "vmap": lambda f: jax.vmap(f)(X[None]),
    "freeze": lambda f: f.freeze()(X),
}


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("over", [auto_layout, over_jit])
def test_a_function_is_traced_once(with_options, name, over):
    """Also where its plan wants compiler options, so that its jit has to be made anew."""
    fun, seen = counted()
    f = over(fun)
    f(X), LOOKS[name](f), f(X), LOOKS[name](f)
    assert f.plan(X).compiler_options == with_options and len(seen) == 1
    fun, seen = counted()
    f = over(fun)
    LOOKS[name](f), f(X), f(X)
    assert len(seen) == 1


SEQUENCES: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "two shapes": ({}, lambda f: (f(X), f(X[:1]), f(X), f(X[:1]))),
    "two dtypes": ({}, lambda f: (f(X), f(X.astype(jnp.bfloat16), K.astype(jnp.bfloat16)), f(X))),
    "by name": ({}, lambda f: (f(X, K), f(X, k=K), f(x=X, k=K), f(X, K))),
    "weak types": ({}, lambda f: (f(X, K, 1.0), f(X, K, np.float32(1)), f(X, K, 2.0))),
    "static values": ({"static_argnums": 2}, lambda f: (f(X, K, 1), f(X, K, 2), f(X, K, 1), f(X, K, 1.0))),
    "cleared": ({}, lambda f: (f(X), f.clear_cache(), f(X))),
    "without jit": ({}, lambda f: (with_(jax.disable_jit(), f, X), f(X), with_(jax.disable_jit(), f, X))),
    "wide numbers": ({}, lambda f: (f(X), with_(jax.enable_x64(True), f, X), f(X))),
    "precision": ({}, lambda f: (f(X), with_(jax.default_matmul_precision("highest"), f, X), f(X))),
    "promotion": ({}, lambda f: (f(X), with_(jax.numpy_dtype_promotion("strict"), f, X), f(X))),
    "leaks": ({}, lambda f: with_(jax.checking_leaks(), f, X)),
    "transformed": ({}, lambda f: (jax.jit(f)(X), jax.vmap(f)(X[None]), jax.jvp(f, (X,), (X,)), f(X))),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_it_is_traced_as_often_as_under_jit(name):
    keywords, use = SEQUENCES[name]
    traced = []
    for wrap in (jax.jit, auto_layout):
        fun, seen = counted()
        use(wrap(fun, **keywords))
        traced.append(seen)
    assert traced[1] == traced[0]


def test_it_is_traced_once_inside_another_too():
    fun, seen = counted()
    f = auto_layout(fun)
    close(f(X), conv(X, K))
    close(auto_layout(lambda x: f(x) * 2)(X), conv(X, K) * 2)
    assert len(seen) == 1


def test_it_is_traced_once_where_there_is_no_turn_to_measure(monkeypatch):
    def decide(request: Any) -> Any:
        raise NoTurn("somebody is timing")

    monkeypatch.setattr(tuner, "decide", decide)
    fun, seen = counted()
    f = auto_layout(fun)
    close([f(X), f(X)], [conv(X, K)] * 2)
    assert len(seen) == 1


def test_switched_off_it_is_traced_as_often():
    fun, seen = counted()
    f = auto_layout(fun, policy="off")
    f(X), jax.jit(f)(X), jax.grad(lambda x: f(x).sum())(X), f.lower(X), f.eval_shape(X)
    assert len(seen) == 1


# What a function does besides


def pure(log: list[Any], x: Any) -> Any:
    return jax.pure_callback(lambda x: log.append(x.shape) or x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def buffers(log: list[Any], x: Any) -> Any:
    def host(context: Any, out: Any, x: Any) -> None:
        log.append(np.asarray(x).shape)
        np.asarray(out)[...] = np.asarray(x)

    return buffer_callback.buffer_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def impure(log: list[Any], x: Any) -> Any:
    return io_callback(lambda x: log.append(x.shape) or x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def debug(log: list[Any], x: Any) -> Any:
    jax.debug.callback(lambda x: log.append(x.shape), x)
    return x


def with_derivative(host: Any) -> Any:
    f = jax.custom_jvp(host)
    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
    return f


PLACES: dict[str, Callable[[Any], Any]] = {
    "in it": lambda host: host,
    "in jit": jax.jit,
    "in a loop": lambda host: lambda x: lax.scan(lambda x, _: (host(x), None), x, None, length=2)[0],
    "in a branch": lambda host: lambda x: lax.cond(x.sum() < 1e9, host, lambda x: x, x),
    "in checkpoint": jax.checkpoint,
    "in a function with a derivative": with_derivative,
}


@pytest.mark.parametrize(
    ("kind", "place"), [(pure, place) for place in PLACES] + [(kind, "in a loop") for kind in (buffers, impure, debug)]
)
def test_host_code_runs_as_often(judged, kind, place):
    logs: list[list[Any]] = [[], []]
    outs = []
    for wrap, log in zip((jax.jit, auto_layout), logs, strict=True):
        host = PLACES[place](partial(kind, log))
        f = wrap(lambda x: conv(host(x), K) + 1)  # noqa: B023
        outs.append([f(X), f(X)])
        jax.effects_barrier()
    assert logs[1] == logs[0] and len(logs[0]) >= 2
    close(outs[1], outs[0])
    outcome = f.outcome(X)
    assert outcome.kept and outcome.verdict.reason.startswith("not run on trial: it ")
    jax.effects_barrier()
    assert len(logs[1]) == len(logs[0])


def test_host_code_of_frozen_arguments_runs_once(judged):
    log: list[Any] = []
    f = auto_layout(lambda k, x: conv(x, pure(log, k))).freeze(K)
    close(f(X), conv(X, K))
    f(X), f.outcome(X), f.explain(X)
    assert log == [K.shape]


def in_jit(r: Any, x: Any) -> Any:
    @jax.jit
    def inner(r: Any, x: Any) -> Any:
        r[...] = r[...] * 2
        return conv(x, r[...])

    return inner(r, x)


def in_scan(r: Any, x: Any) -> Any:
    def body(c: Any, _: Any) -> Any:
        r[...] = r[...] * 0.5
        return conv(c, r[...]), c.sum()

    return lax.scan(body, x, None, length=2)


def in_while(r: Any, x: Any) -> Any:
    def body(carry: Any) -> Any:
        r[...] = r[...] * 0.5
        return carry[0] + 1, conv(carry[1], r[...])

    return lax.while_loop(lambda carry: carry[0] < 2, body, (0, x))


def in_a_branch(r: Any, x: Any) -> Any:
    def double(x: Any) -> Any:
        r[...] = r[...] * 2
        return conv(x, r[...])

    return lax.cond(x.sum() < 1e9, double, lambda x: x, x)


def by_index(r: Any, x: Any) -> Any:
    r[0] = r[0] * 2
    r[1, 0] += 3.0
    return conv(x, r[...])


def adds(r: Any, x: Any) -> Any:
    y = conv(conv(x, r[...]), KK)
    r[...] += y.mean()
    return y


@pytest.mark.parametrize("fun", [adds, by_index, in_jit, in_scan, in_while, in_a_branch])
def test_references_are_written_as_often(judged, fun):
    found = []
    for wrap in (jax.jit, auto_layout):
        f, r = wrap(fun), jax.new_ref(KK + 0)
        found.append([f(r, X), f(r, X), r[...]])
    close(found[1], found[0])
    outcome = f.outcome(r, X)
    assert outcome.kept and outcome.verdict.reason == "not run on trial: it has side effects"
    close(r[...], found[0][-1])


def test_references_that_are_closed_over_or_traced(judged):
    found = []
    for wrap in (jax.jit, auto_layout):
        r = jax.new_ref(KK + 0)
        f = wrap(lambda x: adds(r, x))  # noqa: B023
        found.append([f(X), f(X), jax.jit(wrap(adds))(r, X), r[...]])
    close(found[1], found[0])
    assert f.outcome(X).kept


def test_a_frozen_reference_is_written_too(judged):
    r, s = jax.new_ref(KK + 0), jax.new_ref(KK + 0)
    f, g = auto_layout(adds).freeze(r), jax.jit(adds)
    for _ in range(2):
        close(f(X), g(s, X))
    close(r[...], s[...])


# Pickling


class Model:
    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, x: Any) -> Any:
        return conv(x, K) * self.scale


def again(value: Any) -> Any:
    return cloudpickle.loads(cloudpickle.dumps(value))


@pytest.mark.parametrize(
    "make",
    [
        lambda: auto_layout(net, numerics="relaxed"),
        lambda: auto_layout(lambda x, k, n=1: conv(x, k) * n),
        lambda: auto_layout(partial(net, n=2)),
        lambda: over_jit(net, static_argnames="n", keep_unused=True),
        lambda: auto_layout(net, static_argnums=2, compiler_options={"xla_cpu_enable_fast_min_max": False}),
        lambda: auto_layout(net, plan=auto_layout(net).plan(X, K)),
    ],
)
def test_pickled(make):
    f = make()
    expected = f(X, K)
    g = again(f)
    close(g(X, K), expected)
    assert (g.options, g.pinned, g.__name__) == (f.options, f.pinned, f.__name__)
    assert g._tuner.jit_keywords == f._tuner.jit_keywords
    assert g.outcome(X, K).kept and is_tuned(g, X, K)


def test_plain_pickle_takes_what_it_can_find_by_name():
    for value in (auto_layout(net), auto_layout(Model(2.0)), auto_layout(Model(2.0).__call__)):
        args = (X, K) if value.__wrapped__ is net else (X,)
        close(pickle.loads(pickle.dumps(value))(*args), value(*args))


def test_pickled_and_frozen():
    frozen = auto_layout(net).freeze(k=K, n=2)
    expected = frozen(X)
    for other in (again(frozen), copy.copy(frozen), copy.deepcopy(frozen)):
        close(other(X), expected)


def test_pickled_flax_modules():
    module = flax_linen.auto_layout(linen.Conv(4, (3, 3)))
    variables = module.init(jax.random.key(0), X)
    close(again(module).apply(variables, X), module.apply(variables, X))
    model = flax_nnx.auto_layout(nnx.Conv(5, 4, (3, 3), rngs=nnx.Rngs(0)))
    close(again(model)(X), model(X))
    step = flax_nnx.auto_layout(lambda model, x: model(x))
    close(again(step)(model, X), step(model, X))


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_copied(how):
    for f in (jax.jit(net), auto_layout(net)):
        close(how({"f": f})["f"](X, K), conv(X, K))


# Where JAX keeps tables of primitives


def line(x: Any, k: Any) -> Any:
    return lax.conv_general_dilated(x, k, (1,), [(1, 1)])


def flops(f: Any) -> Any:
    result = roofline.roofline(f)(X, K)[1]
    return jnp.asarray(result.unfused_flops)


TABLES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "jet": (lambda x, k: jnp.tanh(conv(x, k)), lambda f: jet.jet(f, (X, K), ((X, X, 2 * X), (K, K, K)))),
    "jet of one": (lambda x, k: jnp.tanh(conv(x, k)), lambda f: jet.jet(lambda k: f(X, k), (K,), ((K, K),))),
    "roofline": (conv, flops),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_primitives(name):
    fun, use = TABLES[name]
    f = auto_layout(fun)
    expected = use(jax.jit(fun))
    close(use(f), expected)
    close(use(lambda x, k: f(x, k)), expected)
    close(use(jax.jit(lambda x, k: f(x, k))), expected)
