"""NNX functions and modules whose convolutions are tuned.

    @auto_layout  # as nnx.jit: modules and optimizers are updated in place
    def train_step(model, optimizer, images, labels): ...

    model = auto_layout(ResNet(depth=50, rngs=nnx.Rngs(0)))
    logits = model(images)

Functions are as under `nnx.jit`. A tuned module has the Variables of the one that it is made of.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

import jaxlayout
from jaxlayout.flax.common import Static, bare, disguised, is_array, join, split
from jaxlayout.graph.plan import Plan
from jaxlayout.report import Explanation
from jaxlayout.tuning.options import Options
from jaxlayout.tuning.outcome import Outcome


def auto_layout(target: Any = None, /, **keywords: Any) -> Any:
    """A function of modules, or a module, compiled as by `jaxlayout.auto_layout`.

    A function becomes what `nnx.jit` makes of it, an `AutoLayout`: arguments and results may hold modules, optimizers
    and Variables, shared ones among them, and all that it does to them, new attributes included, is done to those of
    the caller.

    A module becomes one whose `__call__` is such a function. It is of a subclass by the same name, and holds the very
    attributes of the one given: the same Variables, trained together, and a state of the same structure
    (`nnx.state`, checkpoints). Only `nnx.graphdef` differs, in the class. Arguments of the call that are no arrays
    (`train=True`) stay as they are, and each new value of one is another program. A module class becomes the class of
    such modules.

    Args:
      target: a function, an `nnx.Module` or a class of those.
      keywords: any field of `jaxlayout.Options`; for a function also `plan` and those of `jax.jit`, but for shardings.

    Raises:
      TypeError: for an unknown keyword and for a bound method: decorate it in the class, or the class's own.
      ValueError: for an option out of its range.
    """
    if target is None:
        return functools.partial(auto_layout, **keywords)
    if isinstance(target, type) and issubclass(target, nnx.Module):
        return _tuned_class(bare(target), Options.from_environment(**keywords))
    if isinstance(target, nnx.Module):
        tuned = copy.copy(target)
        cls = _tuned_class(bare(type(target)), Options.from_environment(**keywords))
        object.__setattr__(tuned, "__class__", cls)
        return tuned
    return AutoLayout(target, **keywords)


class AutoLayout:
    """A function under `auto_layout`. Called like the function that it wraps."""

    def __init__(self, fun: Callable[..., Any], **keywords: Any):
        if refused := [name for name in ("in_shardings", "out_shardings") if name in keywords]:
            raise TypeError(f"auto_layout of a function of modules does not take {' and '.join(refused)}")
        if isinstance(fun, types.MethodType) and isinstance(fun.__self__, nnx.Module):
            raise TypeError(f"auto_layout: {fun!r} is bound to its module, which has to be an argument")
        functools.update_wrapper(self, fun, updated=())

        @functools.wraps(fun, updated=())
        def pure(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = nnx.from_tree((args, kwargs), merge_fn=_merged, ctxtag=self, is_inner=True)
            out = fun(*args, **kwargs)
            args, kwargs, out = nnx.to_tree((args, kwargs, out), split_fn=_apart, ctxtag=self)
            return _nodes(args), _nodes(kwargs), out

        self.pure = jaxlayout.auto_layout(pure, **keywords)
        """The function of what `nnx.to_tree` makes of modules, to what it makes of those and of the results."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        with nnx.update_context(self):
            found = self._run(self.pure, args, kwargs)
            return nnx.from_tree(found, merge_fn=_merged, ctxtag=self, is_inner=False)[2]

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"auto_layout({self.__wrapped__!r})"  # type: ignore[attr-defined]

    def outcome(self, /, *args: Any, **kwargs: Any) -> Outcome:
        """As of `jaxlayout.AutoLayout`. Modules are left as they are."""
        with nnx.update_context(self):
            return self._run(self.pure.outcome, args, kwargs)

    def plan(self, /, *args: Any, **kwargs: Any) -> Plan:
        """As of `jaxlayout.AutoLayout`. Modules are left as they are."""
        return self.outcome(*args, **kwargs).plan

    def explain(self, /, *args: Any, **kwargs: Any) -> Explanation:
        """As of `jaxlayout.AutoLayout`. Modules are left as they are."""
        with nnx.update_context(self):
            return self._run(self.pure.explain, args, kwargs)

    def _run(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = nnx.to_tree((args, kwargs), split_fn=_apart, ctxtag=self)
        return run(*args, **kwargs)


def _apart(context: nnx.SplitContext, path: Any, prefix: Any, node: Any) -> nnx.NodeStates:
    return nnx.NodeStates.from_split(*context.flatten(node, with_paths=False))


def _merged(context: nnx.MergeContext, path: Any, prefix: Any, states: nnx.NodeStates) -> Any:
    return context.unflatten(states.graphdef, *states.states)


def _nodes(tree: Any) -> Any:
    """Without the arrays, which are the caller's as they were."""
    is_node = lambda leaf: isinstance(leaf, nnx.NodeStates)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf if is_node(leaf) else None, tree, is_leaf=is_node)


@functools.cache
def _tuned_class(base: type[nnx.Module], options: Options) -> type[nnx.Module]:
    """A subclass that says it is `base`."""
    call: Any = base.__call__

    def function(module: nnx.Module, leaves: list[Any], rest: Static) -> Any:
        args, kwargs = join(leaves, rest)
        return split(call(module, *args, **kwargs), _dynamic, is_leaf=_is_graph)

    function.__name__ = base.__name__
    compiled = AutoLayout(function, static_argnums=2, **dataclasses.asdict(options))

    @functools.wraps(call)
    def tuned(self: Any, *args: Any, **kwargs: Any) -> Any:
        return join(*compiled(self, *split((args, kwargs), _dynamic, is_leaf=_is_graph)))

    return disguised(base, __call__=tuned)


def _is_graph(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


def _dynamic(leaf: Any) -> bool:
    return is_array(leaf) or _is_graph(leaf)
