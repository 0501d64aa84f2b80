"""Linen modules whose convolutions are tuned.

    model = auto_layout(ResNet(depth=50))
    variables = model.init(key, images)
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])

A tuned module is one of the same class, to `isinstance` and to its parent, with the same fields, name and variables:
only its methods differ. Each runs the bare method as a function of variables, random numbers and arrays, which is how
Flax's own lifted transformations (`nn.jit`) work, and what is used of Flax here is what those are made of.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax.core import DenyList, Scope
from flax.core.lift import pack
from flax.linen.transforms import get_module_scopes, set_module_scopes

from jaxlayout.api.decorator import AutoLayout
from jaxlayout.flax.common import Static, bare, disguised, is_array, join, split
from jaxlayout.tuning.options import Options

M = TypeVar("M", bound=nn.Module | type[nn.Module])


def auto_layout(module: M, /, **options: Any) -> M:
    """A module, or a module class, with every public method compiled as by `jaxlayout.auto_layout`.

    The variables are those of the bare module, name for name, also as a submodule (made in `setup` or in a compact
    method): a checkpoint of one is a checkpoint of the other. Random numbers are the same, too. `init`, and a call
    that asks for the collection `intermediates`, run as written; so does a method called without arrays (helpers of
    `setup`), `__call__` excepted.

    Arguments that are no arrays (`train=True`) stay as they are, and each new value of one is another program; a
    number that changes often should be an array. To see, save or freeze a plan, decorate a function that calls `apply`.

    Args:
      module: an `nn.Module`, bound or not, or a class of them.
      options: any field of `jaxlayout.Options`.

    Raises:
      TypeError: for an unknown keyword, for what is no module, and, when called, for an argument that is neither
        hashable nor an array or a pytree of those, and for a field of the module of that kind.
      ValueError: for an option out of its range.
    """
    chosen = Options.from_environment(**options)
    if isinstance(module, type) and issubclass(module, nn.Module):
        return _tuned_class(bare(module), chosen)  # type: ignore[return-value]
    if not isinstance(module, nn.Module):
        raise TypeError(f"auto_layout: {module!r} is not a module of flax.linen")
    # One that has a scope already, in a compact method, has taken its name there: the tuned one works in that scope.
    parent = module.parent if module.scope is None else module.scope
    return _tuned_class(bare(type(module)), chosen)(**_fields(module), parent=parent)  # type: ignore[return-value]


@functools.cache
def _tuned_class(base: type[nn.Module], chosen: Options) -> type[nn.Module]:
    """A subclass that says it is `base`: automatic names of submodules are those of their class."""
    methods = {name: _tuned_method(base, name, chosen) for name in _methods(base)}

    def apply(self: Any, variables: Any, *args: Any, method: Any = None, **keywords: Any) -> Any:
        """As of the bare module."""
        name = getattr(method, "__name__", "")
        own = name in methods and method is getattr(base, name)  # apply(..., method=Bare.encode)
        return super(tuned, self).apply(variables, *args, method=getattr(tuned, name) if own else method, **keywords)

    tuned: Any = disguised(base, **methods, apply=nn.nowrap(apply))
    return tuned


def _methods(base: type[nn.Module]) -> list[str]:
    """The methods to be tuned: those of modules, neither private nor for Flax to leave alone (`nn.nowrap`)."""
    fields = {field.name for field in dataclasses.fields(base)}  # whose default may be a function
    return [
        name
        for name in dir(base)
        if (name == "__call__" or (not name.startswith("_") and not hasattr(nn.Module, name) and name not in fields))
        and inspect.isfunction(inspect.getattr_static(base, name))
        and not hasattr(getattr(base, name), "nowrap")
    ]


def _tuned_method(base: type[nn.Module], name: str, chosen: Options) -> Callable[..., Any]:
    method = getattr(base, name)

    @functools.wraps(method)  # with Flax's mark of a method that manages the module's state: it must not do so twice
    def tuned(self: Any, *args: Any, **kwargs: Any) -> Any:
        concerned = name == "__call__" or any(map(is_array, jax.tree.leaves((args, kwargs))))
        if not concerned or self.scope is None or self.is_initializing() or _records(self):
            return method(self, *args, **kwargs)
        cls = base if bare(type(self)) is base else type(self)
        scopes, args, kwargs = get_module_scopes(self, args, kwargs)
        arrays, rest = split((args, kwargs))

        def call(inner: list[Scope], arrays: list[Any]) -> Any:
            args, kwargs = join(arrays, rest)
            module, args, kwargs = set_module_scopes(cls(**_fields(self), parent=None), args, kwargs, inner)
            return split(method(module, *args, **kwargs))

        def lifted(scope_fn: Any, repack: Any, variables: Any, rngs: Any, arrays: list[Any]) -> Any:
            before = _counts(scopes)

            def run(variables: Any, rngs: Any, arrays: list[Any]) -> Any:
                _set_counts(scopes, before)  # tracing counts random numbers, and may happen more than once
                inner = scope_fn(variables, rngs)
                out = call(inner, arrays)
                return out, repack(inner), _counts(scopes)

            known = [(scope.path, scope.flags, _hashable(scope.mutable)) for scope in scopes]
            key = _Call((cls, name, rest, before, tuple(known)), run)
            try:
                out, variables, after = _function(definition, chosen)(key, variables, rngs, arrays)
            finally:
                key.run = None  # the cache of compiled programs keeps the call
            _set_counts(scopes, after)
            return out, variables

        definition = self.unbind()[0]
        return join(*pack(lifted, (True,), (True,), (True,))(scopes, arrays))

    return tuned


@functools.lru_cache(maxsize=256)
def _function(definition: nn.Module, chosen: Options) -> AutoLayout:
    """What all calls of a module run."""

    def function(call: _Call, variables: Any, rngs: Any, arrays: Any) -> Any:
        return call.run(variables, rngs, arrays)

    function.__name__ = type(definition).__name__
    return AutoLayout(function, chosen, None, {"static_argnums": 0})


class _Call:
    """What is static of a call, and how to trace it; calls of equal keys trace to the same program."""

    def __init__(self, key: Any, run: Any):
        self.key = key
        self.hash = hash(key)
        self.run = run

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Call) and self.key == other.key

    def __hash__(self) -> int:
        return self.hash


def _fields(module: nn.Module) -> dict[str, Any]:
    return {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.init and f.name != "parent"}


def _records(module: nn.Module) -> bool:
    """Whether a call asks for intermediates: which ones (`capture_intermediates`) is nowhere to be seen."""
    assert module.scope is not None
    listed = not isinstance(module.scope.mutable, bool | DenyList)
    return listed and module.is_mutable_collection("intermediates")


def _hashable(names: Any) -> Any:
    """A filter of collections as a part of a key."""
    if isinstance(names, bool | str):
        return names
    if isinstance(names, DenyList):
        return DenyList(_hashable(names.deny))
    return frozenset(names)


def _counts(scopes: list[Scope]) -> Static:
    """How many random numbers each scope has drawn of each kind, its children (dicts in the dict) included."""

    def frozen(counts: dict[Any, Any]) -> frozenset[Any]:
        pairs = ((k, frozen(n) if isinstance(n, dict) else n) for k, n in counts.items())
        return frozenset((k, n) for k, n in pairs if n)

    return Static(tuple(frozen(scope.rng_counters) for scope in scopes))


def _set_counts(scopes: list[Scope], counts: Static) -> None:
    """In place: scopes share their counts with those of the same path, and with their children."""

    def thaw(into: dict[Any, Any], found: frozenset[Any], zeros: dict[str, int]) -> None:
        drawn = dict(found)
        for key in [*into, *(drawn.keys() - into.keys())]:
            if isinstance(key, str):
                into[key] = drawn.get(key, 0)
            else:
                thaw(into.setdefault(key, dict(zeros)), drawn.get(key, frozenset()), zeros)

    for scope, found in zip(scopes, counts.value, strict=True):
        thaw(scope.rng_counters, found, dict.fromkeys(scope.rngs, 0))
