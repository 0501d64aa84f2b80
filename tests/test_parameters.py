"""Every parameter of an equation that is made anew survives, but for those that speak of axes or hold what it runs.

The tables say what parameters there are. One that a later JAX adds is in neither, and fails here: see what it means,
and whether it has to follow the axes, before it is entered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives as p
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_loops import mesh
from test_rules import FUNCTIONS, SHAPE, after_convolution, graph_in

from jaxlayout.convs.primitive import CONVOLUTIONS
from jaxlayout.graph.program import equations
from jaxlayout.graph.rules import bodies_of, rule_for
from jaxlayout.graph.rules.base import rule_names
from jaxlayout.graph.rules.elementwise import ELEMENTWISE
from jaxlayout.graph.solve import plan_of
from jaxlayout.rewrite.retrace import retrace

WINDOW = "window_dimensions window_strides padding base_dilation window_dilation"
MOVED = {
    "argmax": "axes", "argmin": "axes", "broadcast_in_dim": "shape broadcast_dimensions", "concatenate": "dimension",
    "conv_general_dilated": "dimension_numbers", "cumlogsumexp": "axis", "cummax": "axis", "cummin": "axis",
    "cumprod": "axis", "cumsum": "axis", "dot_general": "dimension_numbers", "dynamic_slice": "slice_sizes",
    "iota": "shape dimension", "pad": "padding_config", "reduce": "dimensions", "reduce_and": "axes",
    "reduce_max": "axes", "reduce_min": "axes", "reduce_or": "axes", "reduce_prod": "axes", "reduce_sum": "axes",
    "reduce_xor": "axes", "reduce_window": WINDOW, "reduce_window_max": WINDOW, "reduce_window_min": WINDOW,
    "reduce_window_sum": WINDOW, "reshape": "new_sizes", "rev": "dimensions", "select_and_gather_add": WINDOW,
    "select_and_scatter_add": "window_dimensions window_strides padding", "sharding_constraint":
    "sharding unconstrained_dims", "slice": "start_indices limit_indices strides", "split": "axis",
    "squeeze": "dimensions",
    # What it runs, and what follows from that.
    "remat2": "jaxpr policy", "cond": "branches", "custom_jvp_call": "call_jaxpr jvp_jaxpr_fun",
    "custom_vjp_call": "call_jaxpr fwd_jaxpr_thunk bwd out_trees", "jit": "jaxpr", "scan": "jaxpr",
    "shard_map": "jaxpr in_specs out_specs", "while": "cond_jaxpr body_jaxpr",
}  # fmt: skip
"""What changes with the order, by primitive."""

ACCURACY = "cbrt cos erfc exp exp2 expm1 log log1p log2 logistic rsqrt sin sqrt tan tanh"
KEPT = dict.fromkeys(ACCURACY.split(), "accuracy") | {
    "argmax": "index_dtype out_sharding", "argmin": "index_dtype out_sharding", "bitcast_convert_type": "new_dtype",
    "broadcast_in_dim": "sharding", "remat2": "prevent_cse differentiated", "cond": "branches_platforms",
    "conj": "input_dtype", "conv_general_dilated": "window_strides padding lhs_dilation rhs_dilation "
    "feature_group_count batch_group_count precision preferred_element_type out_sharding",
    "convert_element_type": "new_dtype weak_type sharding", "custom_jvp_call": "num_consts symbolic_zeros",
    "custom_vjp_call": "num_consts symbolic_zeros", "cumlogsumexp": "reverse", "cummax": "reverse",
    "cummin": "reverse", "cumprod": "reverse", "cumsum": "reverse",
    "dot_general": "precision preferred_element_type out_sharding", "integer_pow": "y",
    "iota": "dtype sharding", "jit": "name inline keep_unused donated_invars ctx_mesh compiler_options_kvs "
    "in_shardings out_shardings in_layouts out_layouts", "mul": "out_dtype", "name": "name", "polynomial": "unroll",
    "reduce": "computation jaxpr consts out_sharding", "reduce_precision": "exponent_bits mantissa_bits",
    "reduce_max": "out_sharding", "reduce_min": "out_sharding", "reduce_prod": "out_sharding",
    "reduce_and": "out_sharding", "reduce_or": "out_sharding", "reduce_xor": "out_sharding",
    "reduce_sum": "out_sharding", "reduce_window": "jaxpr consts", "reshape": "dimensions sharding",
    "round": "rounding_method",
    "scan": "length reverse unroll num_consts num_carry ft_in ft_out", "select_and_gather_add": "select_prim",
    "select_and_scatter_add": "select_prim", "shard_map": "mesh newly_manual_axes check_vma",
    "sharding_constraint": "layout context_mesh", "split": "sizes", "while": "cond_nconsts body_nconsts",
}  # fmt: skip
"""What does not."""

INTEGERS, COMPLEX = (lambda x: x.astype(np.int32)), (lambda x: lax.complex(x, x))
NAMES = {"and": "bitwise_and", "or": "bitwise_or", "not": "bitwise_not", "xor": "bitwise_xor"}
NAMES |= {"regularized_incomplete_beta": "betainc"}


def of_elements(name: str) -> Callable[[Any], Any] | None:
    """A function with an elementwise primitive in it: that of its name, of as many operands, of whatever dtype."""
    fun = getattr(lax, NAMES.get(name, name), None) or getattr(lax, f"{name}_", None)
    for to in (lambda x: x, INTEGERS, COMPLEX, lambda x: x > 0):
        for count in (1, 2, 3) if fun else ():

            def apply(x: Any, to: Any = to, count: int = count) -> Any:
                return fun(*[to(x)] * count)

            try:
                found = jax.make_jaxpr(apply)(np.ones(SHAPE, np.float32))
            except Exception:  # another number of operands, another dtype
                continue
            if any(str(eqn.primitive) == name for eqn in equations(found)):
                return apply
    return None


BY_HAND: dict[str, Callable[[Any], Any]] = {
    "add_any": jax.grad(lambda x: jnp.sum(x * x * x)),
    "bitcast_convert_type": lambda x: lax.bitcast_convert_type(x, np.int32),
    "convert_element_type": lambda x: lax.convert_element_type(x, jnp.bfloat16),
    "copy": lambda x: jnp.array(x, copy=True),
    "eq_to": lambda x: p.eq_to_p.bind(x, x),
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    "le_to": lambda x: p.le_to_p.bind(x, x),
    "lt_to": lambda x: p.lt_to_p.bind(x, x),
    "name": lambda x: checkpoint_name(x, "here"),
    "polynomial": lambda x: lax.polynomial(x, [1.0, x, 2.0], unroll=4),  # pyright: ignore[reportAttributeAccessIssue]
    "reduce_precision": lambda x: lax.reduce_precision(x, 5, 10),
}


@jax.custom_jvp
def with_jvp(x: Any) -> Any:
    return jnp.sin(x)


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), tangents[0]))


@jax.custom_vjp
def with_vjp(x: Any) -> Any:
    return jnp.sin(x)


with_vjp.defvjp(lambda x: (with_vjp(x), x), lambda x, ct: (ct * x,))


def sharded(x: Any, check: bool) -> Any:
    both = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data")
    return jax.shard_map(jnp.sin, mesh=both, in_specs=spec, out_specs=spec, axis_names={"data"}, check_vma=check)(x)


def constrained(x: Any) -> Any:
    spec = P("data", P.UNCONSTRAINED)
    return lax.with_sharding_constraint(x, NamedSharding(mesh(), spec, memory_kind="device"))


def saveable(x: Any) -> Any:
    policy = jax.checkpoint_policies.dots_saveable
    return jax.checkpoint(lambda x, y: jnp.sin(x * y), policy=policy, prevent_cse=(True, False))(x, 2 * x)


REGIONS: dict[str, list[Callable[[Any], Any]]] = {
    "remat2": [jax.checkpoint(jnp.sin, prevent_cse=False), saveable, jax.grad(lambda x: saveable(x).sum())],
    "cond": [
        lambda x: lax.cond(x[0, 0, 0, 0] > 0, jnp.sin, jnp.cos, x),
        lambda x: lax.platform_dependent(x, cpu=jnp.sin, tpu=jnp.cos, default=jnp.tan),
    ],
    "custom_jvp_call": [with_jvp],
    "custom_vjp_call": [with_vjp],
    "jit": [jax.jit(jnp.sin, keep_unused=True, donate_argnums=0), jax.jit(jnp.sin, inline=False)],
    "scan": [
        lambda x: lax.scan(lambda c, _: (jnp.sin(c), c), x, None, length=3, reverse=True, unroll=2),
        lambda x: lax.scan(lambda c, y: (c + 1, jnp.sin(y)), 0, jnp.stack([x, x]))[1],
    ],
    "shard_map": [lambda x: sharded(x, True), lambda x: sharded(x, False)],
    "sharding_constraint": [constrained],
    "while": [
        lambda x: lax.while_loop(lambda x: x[0, 0, 0, 0] < 3, jnp.sin, x),
        jax.vmap(lambda x: lax.while_loop(lambda x: x[0, 0, 0] < 3, jnp.sin, x)),
    ],
}


def functions() -> dict[str, list[Callable[[Any], Any]]]:
    """By the primitives that they are for."""
    found = {name: [BY_HAND.get(name) or of_elements(name)] for name in map(str, ELEMENTWISE)}
    assert not [name for name, (fun,) in found.items() if fun is None]
    return found | FUNCTIONS | REGIONS


def retraced(order: str, fun: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The jaxpr of a function after a convolution, and again with all that can be in another order."""
    args = [np.ones(shape, np.float32) for shape in ((2, 2, 4, 5), (6, 2, 1, 1))]
    jaxpr = jax.make_jaxpr(after_convolution(fun))(*args)
    graph = graph_in(order, jaxpr)
    return jaxpr, jax.make_jaxpr(retrace(jaxpr, plan_of(graph, [node.modes[-1] for node in graph.nodes])))(*args)


def by_primitive(jaxpr: Any) -> dict[str, list[dict[str, Any]]]:
    """The parameters of all equations that may be made anew."""
    found = defaultdict(list)
    for eqn in equations(jaxpr):
        if eqn.primitive in CONVOLUTIONS:
            found["conv_general_dilated"].append(eqn.params)
        elif rule_for(eqn.primitive) is not None and eqn.primitive is not p.transpose_p:
            found[eqn.primitive.name].append(eqn.params)
    return found


def test_a_parameter_that_nobody_knows_makes_a_barrier():
    """Where the equation is not bound with all that it has, but made anew by a function of JAX."""
    for name in ("custom_jvp_call", "custom_vjp_call", "shard_map"):
        (eqn,) = (eqn for eqn in jax.make_jaxpr(REGIONS[name][0])(np.ones(SHAPE, np.float32)).eqns)
        assert eqn.primitive.name == name and bodies_of(eqn) is not None
        assert bodies_of(eqn.replace(params=eqn.params | {"of a later JAX": 1})) is None


def test_every_parameter_survives():
    seen, moved = set(), set()
    for name, fun in [(name, fun) for name, funs in functions().items() for fun in funs]:
        before, after = map(by_primitive, retraced("NHWC", fun))
        if name != "reshape":  # conversions, where only axes of size 1 move
            before.pop("reshape", None), after.pop("reshape", None)
        assert before.keys() == after.keys() and (name in before or name == "transpose")
        for primitive in before:
            follow, keep = (table.get(primitive, "").split() for table in (MOVED, KEPT))
            assert len(before[primitive]) == len(after[primitive])
            for old, new in zip(before[primitive], after[primitive], strict=True):
                unknown = old.keys() - {*follow, *keep}
                assert not unknown, f"{primitive} has parameters that no table has: {unknown}"
                changed = {n for n in old if n not in new or not (old[n] is new[n] or old[n] == new[n])}
                assert changed <= {*follow}, (name, primitive, changed)
                moved |= {(primitive, n) for n in changed}
            seen.add(primitive)
    missing = {name.partition("@")[0] for name in rule_names()} - seen - {"transpose", "pvary"}
    assert not missing
    assert moved == {(primitive, n) for primitive, names in MOVED.items() for n in names.split()}
