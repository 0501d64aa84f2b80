"""Tuned NNX functions and modules do to their arguments what `nnx.jit` and the bare ones do, with other convolutions.

Held against those under costs with which every convolution changes its order (`forced`); `is_tuned` says that it did.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from helpers import normal

from jaxlayout import Plan
from jaxlayout.flax.nnx import AutoLayout, auto_layout

pytestmark = pytest.mark.usefixtures("forced")

X = normal(0, 2, 8, 8, 3)


class Block(nnx.Module):
    def __init__(self, features: int = 3, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, features, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train: bool = True):
        assert isinstance(train, bool)  # no tracer, no 1
        x = self.norm(self.conv(x), use_running_average=not train)
        return self.dropout(nnx.relu(x), deterministic=not train)


class Net(nnx.Module):
    """The same block in an attribute and in a list."""

    def __init__(self, wrap: Callable[[Any], Any] = lambda module: module, *, rngs: nnx.Rngs):
        self.first = wrap(Block(rngs=rngs))
        self.rest = nnx.List([self.first])

    def __call__(self, x, train: bool = True):
        return self.rest[0](self.first(x, train), train=train).mean((1, 2))


def net(wrap: Callable[[Any], Any] = lambda module: module) -> Any:
    return Net(wrap, rngs=nnx.Rngs(0))


def block() -> Any:
    return Block(rngs=nnx.Rngs(0))


def is_tuned(fun: Callable[..., Any], model: nnx.Module, *args: Any) -> bool:
    graphdef, state = nnx.split(model)
    merged = lambda state, *args: jax.tree.leaves(fun(nnx.merge(graphdef, state), *args))  # noqa: E731
    return helpers.has_chosen(jax.make_jaxpr(merged)(state, *args))


def pure(tree: Any) -> Any:
    """Modules as their states, random keys as numbers."""
    is_module = lambda leaf: isinstance(leaf, nnx.Pytree)  # noqa: E731
    state = jax.tree.map(lambda x: nnx.to_pure_dict(nnx.state(x)) if is_module(x) else x, tree, is_leaf=is_module)
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state)


def close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    helpers.close(pure(found), pure(expected), tolerance, least=1.0)


# Functions


def optimizer_of(model: nnx.Module) -> nnx.Optimizer:
    return nnx.Optimizer(model, optax.sgd(0.1, 0.9), wrt=nnx.Param)


def train_step(model, optimizer, x):
    loss, gradients = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
    optimizer.update(model, gradients)
    return loss


def test_training_step():
    """Parameters, which model and optimizer share, momenta, statistics and counts of random numbers."""
    runs = []
    for jit in (nnx.jit, auto_layout):
        model, step = net(), jit(train_step)
        optimizer = optimizer_of(model)
        losses = [step(model, optimizer, X) for _ in range(3)]
        runs.append((losses, model, optimizer))
        assert model.first is model.rest[0]
        assert int(model.first.dropout.rngs.count[...]) == 6
    close(runs[1], runs[0], 1e-4)
    assert len(set(map(float, losses))) == 3
    assert is_tuned(lambda model, x: step(model, optimizer_of(model), x), net(), X)


def forward(model, x):
    return model(x)


@pytest.mark.parametrize(
    "outer", [nnx.jit, auto_layout, nnx.remat, lambda f: f], ids=["jit", "itself", "remat", "plain"]
)
def test_inside_other_transformations(outer):
    def gradient(fun):
        return lambda model, x: nnx.value_and_grad(lambda model: fun(model, x).sum())(model)

    runs = []
    for fun in (forward, auto_layout(forward)):
        model = block()
        value, gradients = outer(gradient(fun))(model, X)
        runs.append((outer(fun)(model, X), value, nnx.to_pure_dict(gradients), model))
    close(runs[1], runs[0], 1e-4)


def test_vmap_and_scan():
    stacked = nnx.vmap(lambda rngs: Block(rngs=rngs))
    runs = []
    for inner in (forward, auto_layout(forward)):
        blocks = stacked(nnx.Rngs(0).split(2))
        over = nnx.vmap(inner, in_axes=(0, None))(blocks, X)
        in_turn = functools.partial(lambda inner, x, model: inner(model, x), inner)
        through = nnx.scan(in_turn, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(X, blocks)
        runs.append((over, through, blocks))
    close(runs[1], runs[0])


def test_split_and_merge():
    tuned, expected = auto_layout(forward), block()
    graphdef, state = nnx.split(block())
    jitted = jax.jit(lambda state, x: (tuned(model := nnx.merge(graphdef, state), x), nnx.state(model)))
    for _ in range(2):
        out, state = jitted(state, X)
        close(out, expected(X))
    close(nnx.merge(graphdef, state), expected)
    again = nnx.merge(graphdef, state)
    close(tuned(again, X), expected(X))
    close(again, expected)


class Growing(nnx.Module):
    """Changes its structure when called."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.calls = 0

    def __call__(self, x):
        x = self.conv(x)
        self.calls += 1
        if self.calls == 1:
            self.mean = nnx.Intermediate(x.mean())
            self.kernel = self.conv.kernel  # shared from now on
        elif self.calls == 2:
            self.mean = nnx.BatchStat(x.max())  # of another type
            del self.kernel
        return x


@pytest.mark.parametrize(
    "tune", [lambda model: (auto_layout(forward), model), lambda model: (forward, auto_layout(model))]
)
def test_structure_that_changes(tune):
    call, model = tune(Growing(nnx.Rngs(0)))
    expected = Growing(nnx.Rngs(0))
    for calls in (1, 2, 3):
        close(call(model, X), nnx.jit(forward)(expected, X))
        close(model, expected)
        assert model.calls == calls
        assert type(model.mean) is type(expected.mean)
        assert hasattr(model, "kernel") == (calls == 1)
        assert calls != 1 or model.kernel is model.conv.kernel


def test_results_may_be_modules_of_the_caller():
    @auto_layout
    def both(model, other, x):
        return {"model": model, "new": Block(rngs=nnx.Rngs(1)), "out": model(x) + other(x)}

    model = block()
    found = both(model, model, X)
    assert found["model"] is model
    assert type(found["new"]) is Block
    expected = block()
    close(found["out"], expected(X) + expected(X))
    close(model, expected)


def test_keywords_of_jit():
    @auto_layout(static_argnames="times", donate_argnums=0)
    def f(model, x, *, times, scale):
        assert type(times) is int
        for _ in range(times):
            x = model(x)
        return x * scale

    for times in (1, 2):
        model, expected = block(), block()
        close(f(model, X, times=times, scale=2), functools.reduce(lambda x, _: expected(x), range(times), X) * 2.0)
        close(model, expected)
    with pytest.raises(TypeError, match="does not take in_shardings"):
        auto_layout(forward, in_shardings=None)
    with pytest.raises(TypeError, match="unknown keyword nonsense"):
        auto_layout(forward, nonsense=1)


def test_traced_twice(with_options):
    tuned, model, expected = auto_layout(forward), block(), block()
    for _ in range(2):
        close(tuned(model, X), forward(expected, X))
        close(model, expected)
    assert tuned.plan(model, X).compiler_options == with_options


def test_methods():
    class Coder(nnx.Module):
        def __init__(self, rngs):
            self.block = Block(rngs=rngs)

        @auto_layout
        def encode(self, x):
            """Says what it does."""
            return self.block(x)

    model, expected = Coder(nnx.Rngs(0)), block()
    close(model.encode(X), expected(X))
    close(model.block, expected)
    assert isinstance(Coder.encode, AutoLayout)
    assert (Coder.encode.__name__, Coder.encode.__doc__) == ("encode", "Says what it does.")
    assert repr(Coder.encode).startswith("auto_layout(<function")
    with pytest.raises(TypeError, match="is bound to its module"):
        auto_layout(block().__call__)


def test_looking_at_the_plan():
    tuned, model = auto_layout(forward), block()
    before = jax.tree.map(np.array, pure(model))
    plan = tuned.plan(model, X)
    assert not plan.trivial
    assert tuned.outcome(model, X).kept
    assert "Conv.__call__" in str(tuned.explain(model, X))
    close(pure(model), before, 0.0)
    pinned = auto_layout(forward, plan=Plan.from_json(plan.to_json()))
    close(pinned(model, X), forward(block(), X))
    assert pinned.outcome(model, X).source == "pinned"


# Modules


FORMS = {
    "outside": lambda: auto_layout(net()),
    "inside": lambda: net(auto_layout),
    "both": lambda: auto_layout(net(auto_layout)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_module(form):
    tuned, bare = form(), net()
    close(tuned, bare, 0.0)
    for _ in range(2):
        close(tuned(X), bare(X))
        close(tuned, bare)
    assert is_tuned(forward, tuned, X)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_checkpoints(form):
    bare, tuned = net(), form()
    bare.first(X)
    for written, read in ((bare, tuned), (tuned, net())):
        data = serialization.to_bytes(pure(written))
        keys = pure(read)
        assert jax.tree.structure(serialization.from_bytes(keys, data)) == jax.tree.structure(keys)
        nnx.update(read, nnx.state(written))
        close(read, written, 0.0)
    close(nnx.merge(nnx.graphdef(bare), nnx.state(tuned)), bare, 0.0)
    assert type(nnx.merge(*nnx.split(tuned))) is type(tuned)


def test_training_a_module():
    runs = []
    for model in (block(), auto_layout(block())):
        step, optimizer = nnx.jit(train_step), optimizer_of(model)
        runs.append(([step(model, optimizer, X) for _ in range(3)], model, optimizer))
    close(runs[1], runs[0], 1e-4)
    model, bare = auto_layout(block()), block()
    found, expected = (nnx.grad(lambda m: (m(X) ** 2).sum())(m) for m in (model, bare))
    close(nnx.to_pure_dict(found), nnx.to_pure_dict(expected), 1e-4)
    close(model, bare)


def test_the_variables_are_shared():
    bare = block()
    tuned = auto_layout(bare)
    assert tuned is not bare
    assert tuned.conv.kernel is bare.conv.kernel
    tuned(X)
    expected = block()
    expected(X)
    close(bare, expected)
    tuned.extra = 3
    assert not hasattr(bare, "extra")


def test_a_module_like_the_bare_one():
    bare = block()
    tuned = auto_layout(bare, memory_limit=2000.0)
    assert isinstance(tuned, Block)
    assert (type(tuned).__name__, type(tuned).__module__) == ("Block", __name__)
    assert type(tuned) is type(auto_layout(block(), memory_limit=2000.0)) is not type(auto_layout(bare))
    assert type(auto_layout(tuned)) is type(auto_layout(bare)) is auto_layout(Block)
    for copied in (copy.deepcopy(tuned), nnx.clone(tuned)):
        assert type(copied) is type(tuned)
        assert copied.conv.kernel is not bare.conv.kernel
    close(auto_layout(Block)(rngs=nnx.Rngs(0))(X), bare(X))
    assert nnx.view(tuned, deterministic=True, use_running_average=True).dropout.deterministic


def test_arguments_and_results_of_all_kinds():
    traces = []

    class Odd(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)

        def __call__(self, x, other, *, act=nnx.relu, train=False):
            traces.append(train)
            y = other(self.conv(x["images"]))
            return {"out": act(y) * (2 if train is True else 1), "name": "odd", "n": 3, "other": other, "act": act}

    model, other = auto_layout(Odd(nnx.Rngs(0))), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    expected, same = Odd(nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    for train in (True, 1, True):
        found = model({"images": X}, other, act=nnx.gelu, train=train)
        assert (found["name"], found["n"], type(found["n"]), found["act"]) == ("odd", 3, int, nnx.gelu)
        assert found["other"] is other
        close(found["out"], expected({"images": X}, same, act=nnx.gelu, train=train)["out"])
        close(other, same)
    assert list(map(repr, traces)) == ["True", "True", "1", "1", "True"]  # the tuned one's third call is not traced


def test_captured_values():
    class Sowing(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)

        def __call__(self, x):
            x = self.conv(x)
            self.sow(nnx.Intermediate, "mean", x.mean())
            return x

    found, expected = (
        nnx.capture(model, nnx.Intermediate)(X) for model in (auto_layout(Sowing(nnx.Rngs(0))), Sowing(nnx.Rngs(0)))
    )
    close(found[0], expected[0])
    close(nnx.to_pure_dict(found[1]), nnx.to_pure_dict(expected[1]))


def test_errors_are_the_users_own():
    class Failing(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)

        def __call__(self, x, fail=False):
            self.seen = fail
            if fail:
                raise LookupError("mine")
            return self.conv(x)

    for call in (auto_layout(lambda model, x: model(x, fail=True)), lambda model, x: auto_layout(model)(x, fail=True)):
        model = Failing(nnx.Rngs(0))
        with pytest.raises(LookupError, match="mine"):
            call(model, X)
        assert not hasattr(model, "seen")
        with pytest.raises(ValueError, match="must equal the rhs input feature dimension size"):
            auto_layout(forward)(model, X[..., :2])
        close(auto_layout(forward)(model, X), model(X))
    with pytest.raises(ValueError, match="memory_limit"):
        auto_layout(block(), memory_limit=0.5)
    with pytest.raises(TypeError, match="nonsense"):
        auto_layout(block(), nonsense=1)
