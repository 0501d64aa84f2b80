"""A tuned Linen module is the bare one to all who use it, and runs other convolutions.

Every model is held against the bare one, with costs under which every convolution changes its order (`forced`), and
`is_tuned` says that it did.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from helpers import is_tuned, normal, python

from jaxlayout.flax.linen import auto_layout

pytestmark = pytest.mark.usefixtures("forced")

X = normal(0, 2, 8, 8, 3)
KEY = jax.random.key(0)
TRAINING: Any = dict(train=True, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"])


close = functools.partial(helpers.close, least=1.0)


class Block(nn.Module):
    features: int = 4

    @nn.compact
    def __call__(self, x, train: bool = False):
        assert isinstance(train, bool)  # no tracer, no 1
        x = nn.Conv(self.features, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dropout(0.5, deterministic=not train)(nn.relu(x))


class Net(nn.Module):
    """A submodule of each kind: assigned in setup, shared, in a list, and a field."""

    wrap: Callable[[Any], Any] = lambda module: module
    head: nn.Module = nn.Dense(5)

    def setup(self):
        self.first = self.wrap(Block(3))
        self.shared = self.wrap(Block(3))
        self.stages = [self.wrap(Block(features)) for features in self.widths(1)]

    def widths(self, n: int) -> list[int]:  # a helper of setup, which must not be compiled
        return [4] * n

    def encode(self, x, train: bool = False):
        x = self.shared(self.shared(self.first(x, train), train), train=train)
        for stage in self.stages:
            x = stage(x, train)
        return x

    def __call__(self, x, train: bool = False):
        return self.head(self.encode(x, train).mean((1, 2)))


class Compact(nn.Module):
    """Submodules made in a compact method, with automatic and given names, some in another module's fields."""

    wrap: Callable[[Any], Any] = lambda module: module

    @nn.compact
    def __call__(self, x, train: bool = False):
        block = self.wrap(Block())
        x = block(block(nn.Conv(4, (1, 1))(x), train), train)
        x = self.wrap(Block(name="named"))(x, train)
        x = self.wrap(nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(4, (3, 3), name="last")]))(x)
        return self.wrap(nn.Conv(2, (3, 3)))(x)


@functools.cache
def init(bare: nn.Module) -> Any:
    return bare.init(KEY, X)


def same(tuned: nn.Module, bare: nn.Module, *args: Any, **keywords: Any) -> None:
    """Assert that a tuned module with the bare one's variables does as that one, compiled and when compiled before."""
    variables = init(bare)
    expected = bare.apply(variables, *args, **keywords)
    close(tuned.apply(variables, *args, **keywords), expected)
    close(tuned.apply(variables, *args, **keywords), expected)
    assert is_tuned(lambda v: tuned.apply(v, *args, **keywords), variables)


NESTED = [
    (auto_layout, Net(), Net()),
    (auto_layout, Compact(), Compact()),
    (lambda module: module, Net(wrap=auto_layout), Net()),
    (lambda module: module, Compact(wrap=auto_layout), Compact()),
]
nested = pytest.mark.parametrize("outer, module, bare", NESTED, ids=["setup", "compact", "in setup", "in compact"])


@nested
def test_variables_and_checkpoints(outer, module, bare):
    tuned = outer(module)
    variables = bare.init(KEY, X)
    own = tuned.init(KEY, X)
    close(own, variables, 0.0)
    for written, read in ((variables, own), (own, variables)):
        other = jax.tree.map(jnp.zeros_like, read)
        close(serialization.from_bytes(other, serialization.to_bytes(written)), written, 0.0)
    assert not is_tuned(tuned.init, KEY, X)


@nested
def test_training_mode(outer, module, bare):
    tuned = outer(module)
    same(tuned, bare, X, **TRAINING)


def test_inside_jit():
    variables = init(Block())
    found = jax.jit(lambda v, x: auto_layout(Block()).apply(v, x, True, mutable=True, rngs={"dropout": KEY}))(
        variables, X
    )
    close(found, Block().apply(variables, X, True, mutable=True, rngs={"dropout": KEY}))


MUTABLE = [
    *(False, True, "batch_stats", ["batch_stats"], ("batch_stats", "params"), {"batch_stats"}, []),
    *(nn.DenyList("params"), nn.DenyList(["params", "cache"]), nn.DenyList([])),
]


@pytest.mark.parametrize("mutable", MUTABLE, ids=str)
def test_mutable(mutable):
    trains = mutable is True or isinstance(mutable, nn.DenyList) or "batch_stats" in (mutable or [])
    variables = init(Block())
    training = {**TRAINING, "mutable": mutable}
    if trains:
        _, updates = found = auto_layout(Block()).apply(variables, X, **training)
        close(found, Block().apply(variables, X, **training))
        assert updates["batch_stats"]["BatchNorm_0"]["mean"].any()
    else:
        same(auto_layout(Block()), Block(), X, train=False, mutable=mutable)
        with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
            auto_layout(Block()).apply(variables, X, **training)


def test_frozen_dicts():
    variables = flax.core.freeze(Block().init(KEY, X))
    found = auto_layout(Block()).apply(variables, X, **TRAINING)
    close(found, Block().apply(variables, X, **TRAINING))


def test_dropout_draws_the_same():
    """Where a mask falls elsewhere, the zeros do."""
    tuned, variables, drawn = auto_layout(Block()), init(Block()), []
    for seed in (1, 2, 1):
        keywords = {**TRAINING, "rngs": {"dropout": jax.random.key(seed)}}
        drawn.append(tuned.apply(variables, X, **keywords)[0])
        close(drawn[-1], Block().apply(variables, X, **keywords)[0])
    assert (drawn[0] == 0).mean() > 0.5
    assert not np.array_equal(drawn[0] == 0, drawn[1] == 0)
    np.testing.assert_array_equal(drawn[0], drawn[2])


class Noise(nn.Module):
    """Draws in a module that is called twice, in itself and from the parent's other children."""

    wrap: Callable[[Any], Any] = lambda module: module

    @nn.compact
    def __call__(self, x):
        add = self.wrap(Add())
        x = add(x) + jax.random.normal(self.make_rng("noise"), x.shape)
        return add(x) + jax.random.normal(self.make_rng("noise"), x.shape)


class Add(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False, rng_collection="noise")(nn.Conv(3, (3, 3))(x))
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


def test_every_call_draws_anew():
    same(Noise(wrap=auto_layout), Noise(), X, rngs={"noise": KEY})
    same(auto_layout(Add()), Add(), X, rngs=KEY)


def test_gradients_and_training_steps():
    def step(state, statistics, seed):
        def loss(params):
            out, updates = state.apply_fn(
                {"params": params, "batch_stats": statistics},
                X,
                **{**TRAINING, "rngs": {"dropout": jax.random.key(seed)}},
            )
            return (out**2).mean(), updates["batch_stats"]

        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients), statistics, value, gradients

    runs = []
    for model in (Compact(), auto_layout(Compact(wrap=auto_layout))):
        variables = model.init(KEY, X)
        state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.sgd(1e-2, 0.9))
        statistics, seen = variables["batch_stats"], []
        for seed in range(3):
            state, statistics, value, gradients = jax.jit(step)(state, statistics, seed)
            seen.append((value, gradients, statistics))
        runs.append((seen, state.params, state.opt_state))
    close(runs[1], runs[0], 1e-4)


def test_gradient_at_top_level():
    variables = init(Block())
    found, expected = (
        jax.grad(lambda v, m=m: (m.apply(v, X) ** 2).sum())(variables) for m in (auto_layout(Block()), Block())
    )
    close(found, expected, 1e-4)
    assert is_tuned(jax.grad(lambda v: auto_layout(Block()).apply(v, X).sum()), variables)


@pytest.mark.parametrize(
    "method",
    ["encode", Net.encode, lambda model, x, train=False: 2 * model.encode(x, train), "own"],
    ids=["name", "bare", "function", "own"],
)
def test_method(method):
    tuned, bare = auto_layout(Net()), Net()
    variables = bare.init(KEY, X)
    of_bare, of_tuned = (bare.encode, tuned.encode) if method == "own" else (method, method)
    expected = bare.apply(variables, X, method=of_bare, **TRAINING)
    close(tuned.apply(variables, X, method=of_tuned, **TRAINING), expected)
    assert is_tuned(lambda v: tuned.apply(v, X, method=of_tuned), variables)
    with pytest.raises(AttributeError, match="nothing"):
        tuned.apply(variables, X, method="nothing")


def test_class():
    class Parent(nn.Module):
        block: Any

        @nn.compact
        def __call__(self, x):
            return self.block(4)(x)

    same(Parent(auto_layout(Block)), Parent(Block), X)
    assert list(Parent(auto_layout(Block)).init(KEY, X)["params"]) == ["Block_0"]

    class Longer(auto_layout(Block)):  # a class of its own again, whose method the tuned one must call
        more: int = 2

        def __call__(self, x, train: bool = False):
            return super().__call__(x, train) * self.more

    variables = init(Block())
    close(Longer(more=3).apply(variables, X), 3 * Block().apply(variables, X))
    close(auto_layout(Longer(more=3)).apply(variables, X), 3 * Block().apply(variables, X))


class Deep(nn.Module):
    """A block under a lifted transformation."""

    transform: Any
    block: Any = Block

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (1, 1))(x)
        return self.transform(self.block)(x, train)


AXES: Any = {"params": 0, "batch_stats": 0}
SPLIT = {"params": True, "dropout": True}


def plain(block):
    return block(name="block")


def remat(block):
    return nn.remat(block, static_argnums=(2,))(name="block")


def remat_of_instance(block):
    inner = block(name="block")
    return lambda x, train: nn.remat(lambda model, x: model(x, train))(inner, x)


def jit(block):
    return nn.jit(block, static_argnums=(2,))(name="block")


def vmap(block):
    return nn.vmap(block, variable_axes=AXES, split_rngs=SPLIT, in_axes=(None, None), axis_size=2)(name="block")


def scan(block):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, carry, train):
            return block(name="inside")(carry, train), None

    many = nn.scan(Body, AXES, split_rngs=SPLIT, in_axes=nn.broadcast, length=2)(name="block")
    return lambda x, train: many(x, train)[0]


@pytest.mark.parametrize("transform", [remat, remat_of_instance, jit, vmap, scan])
def test_lifted(transform):
    instance = transform in (remat_of_instance, scan)  # the others take classes
    block = (lambda **fields: auto_layout(Block(**fields))) if instance else auto_layout(Block)
    tuned, bare = Deep(transform, block), Deep(transform)
    variables = bare.init(KEY, X)
    close(tuned.init(KEY, X), variables, 0.0)

    def training(model):
        return jax.value_and_grad(lambda v: model.apply(v, X, **TRAINING)[0].sum())

    close(jax.jit(training(tuned))(variables), jax.jit(training(bare))(variables), 1e-4)
    assert is_tuned(training(tuned), variables)


# What JAX does to it


def test_under_vmap_with_a_named_axis():
    class Synchronised(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, axis_name="devices")(nn.Conv(4, (3, 3))(x))

    variables = Synchronised().init(KEY, X[0])

    def each(model, x):
        return model.apply(variables, x, mutable=["batch_stats"])

    found, expected = (
        jax.vmap(lambda x, m=m: each(m, x), axis_name="devices")(X[:, None])
        for m in (auto_layout(Synchronised()), Synchronised())
    )
    close(found, expected, 1e-4)


def test_one_trace_for_equal_calls():
    traces = []

    class Counting(nn.Module):
        features: int = 4

        @nn.compact
        def __call__(self, x, train: Any = False, *, scale: Any = None):
            traces.append(train)
            x = nn.Conv(self.features, (3, 3))(x)
            return x * 3 if train is True else x

    variables = Counting().init(KEY, X)
    traces.clear()
    for _ in range(3):
        auto_layout(Counting()).apply(variables, X)  # equal modules share what was compiled
    assert traces == [False]
    expected = Counting().apply(variables, X)
    for train in (True, 1, 1.0, True, "yes", None):
        factor = 3 if train is True else 1
        close(auto_layout(Counting()).apply(variables, X, train), expected * factor)
        close(auto_layout(Counting()).apply(variables, X, train=train), expected * factor)
    assert [(type(x), x) for x in dict.fromkeys(map(repr, traces))] == [
        (str, name) for name in ("False", "True", "1", "1.0", "'yes'", "None")
    ]
    assert len(traces) == 12  # one in the bare module, and twice each of the others: by name is another program
    with pytest.raises(TypeError, match="unhashable type: 'set'"):
        auto_layout(Counting()).apply(variables, X, {"a"})


def test_traced_once_though_the_jit_is_made_anew(with_options):
    """Random numbers are counted once."""
    traces = []

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(x)
            add = Add()
            return add(add(x))

    same(auto_layout(Counting()), Counting(), X, rngs={"noise": KEY})
    assert len(traces) == 3  # init, the bare call, and the tuned one


def test_arguments_and_results_of_all_kinds():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x, *, choice, act=nn.relu, extra=None):
            y = nn.Conv(4, (3, 3))(x[choice["which"]])
            return {"out": act(y), "name": "odd", "n": 3, "none": extra, "twice": (choice["number"] * 2, act)}

    batch = {"images": X}
    choice = {"which": "images", "number": np.arange(3.0, dtype=np.float32)}
    variables = Odd().init(KEY, batch, choice=choice)
    found = auto_layout(Odd()).apply(variables, batch, choice=choice, act=nn.gelu)
    assert (found["name"], found["n"], type(found["n"]), found["none"]) == ("odd", 3, int, None)
    assert found["twice"][1] is nn.gelu
    expected = Odd().apply(variables, batch, choice=choice, act=nn.gelu)
    close((found["out"], found["twice"][0]), (expected["out"], jnp.asarray(expected["twice"][0])))


def test_arguments_die():
    """No cache keeps the variables or the arguments of a call."""
    model = auto_layout(Net(wrap=auto_layout))
    variables, x = jax.tree.map(jnp.array, Net().init(KEY, X)), X + 1
    held = [weakref.ref(leaf) for leaf in (*jax.tree.leaves(variables), x)]
    model.apply(variables, x, **TRAINING)
    del variables, x
    gc.collect()
    assert not any(ref() is not None for ref in held)


# What it is


def test_a_module_like_the_bare_one():
    bare = Block(features=6, name="block")
    tuned = auto_layout(bare, memory_limit=2000.0)
    assert isinstance(tuned, Block)
    assert (tuned.features, tuned.name, type(tuned).__name__, type(tuned).__module__) == (6, "block", "Block", __name__)
    assert repr(tuned) == repr(bare)
    assert tuned == auto_layout(bare, memory_limit=2000.0) != auto_layout(bare)
    assert hash(tuned) == hash(auto_layout(bare, memory_limit=2000.0))
    assert auto_layout(tuned) == auto_layout(bare)  # once, as told last
    assert tuned.copy(features=7).features == tuned.clone(features=7).features == 7
    assert copy.deepcopy(tuned) == tuned
    assert tuned.tabulate(KEY, X) == bare.tabulate(KEY, X)


def test_bound():
    variables = init(Net())
    bound = auto_layout(Net()).bind(variables)
    close(bound(X), Net().apply(variables, X))
    close(bound.encode(X), Net().apply(variables, X, method="encode"))
    close(bound.first(X), Net().bind(variables).first(X))
    module, own = bound.unbind()
    close(module.apply(own, X), Net().apply(variables, X))
    assert bound.widths(3) == [4, 4, 4]


def test_intermediates():
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(x)
            self.sow("intermediates", "mean", x.mean())
            self.sow("losses", "mean", x.mean())
            return x

    model, variables = auto_layout(Sowing()), Sowing().init(KEY, X)
    params = {"params": variables["params"]}
    for keywords in ({"mutable": ["intermediates"]}, {"capture_intermediates": True}, {"mutable": ["losses"]}):
        for module in (model, Deep(plain, auto_layout(Block)), Net(wrap=auto_layout)):
            bare = {Sowing: Sowing(), Deep: Deep(plain), Net: Net()}.get(type(module), Sowing())
            at = params if bare == Sowing() else bare.init(KEY, X)
            close(module.apply(at, X, **keywords), bare.apply(at, X, **keywords))
    assert is_tuned(lambda v: model.apply(v, X, mutable=["losses"]), params)


# Errors


def test_errors_are_those_of_the_bare_module():
    class Failing(nn.Module):
        @nn.compact
        def __call__(self, x, why="params"):
            if why == "own":
                raise LookupError("mine")
            if why == "rng":
                self.make_rng("missing")
            return nn.Conv(4, (3, 3))(x)

    variables = Failing().init(KEY, X)
    wrong = jax.tree.map(lambda leaf: leaf[..., :2], variables)
    cases = [(variables, X, "own"), (variables, X, "rng"), ({}, X, ""), (wrong, X, ""), (variables, X[..., :2], "")]
    for at, x, why in cases:
        with pytest.raises(Exception) as expected:
            Failing().apply(at, x, why)
        with pytest.raises(expected.type) as found:
            auto_layout(Failing()).apply(at, x, why)
        assert str(found.value) == str(expected.value)
    with pytest.raises(flax.errors.CallCompactUnboundModuleError):
        auto_layout(Failing())(X)
    same(auto_layout(Failing()), Failing(), X)  # and it goes on as ever


def test_what_is_refused():
    with pytest.raises(TypeError, match="is not a module of flax"):
        auto_layout(lambda x: x)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="nonsense"):
        auto_layout(Net(), nonsense=1)
    with pytest.raises(ValueError, match="memory_limit"):
        auto_layout(Net(), memory_limit=0.5)

    class Unhashable(nn.Module):
        table: Any

        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3, 3))(x)

    model = auto_layout(Unhashable(np.ones(3)))
    variables = model.init(KEY, X)
    with pytest.raises(TypeError, match="unhashable attributes"):
        model.apply(variables, X)


def test_importing_jaxlayout_does_not_import_flax():
    code = "import sys, jaxlayout; sys.exit(bool({'flax', 'optax'} & sys.modules.keys()))"
    python("-c", code)
