"""Agnostic primitives: every operand and result has the same axes, and nothing depends on their order."""

from jax.extend.core import primitives as p

from jaxlayout.graph.rules.base import Labelling, Rule, is_placed, register_rule, same_axes

_NAMES = """
abs acos acosh add add_jaxvals and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil
clamp clz complex conj convert_element_type copy cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge
gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul
name ne neg nextafter not one_minus_square or polygamma polynomial population_count pow real reduce_precision
regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh
sqrt square stop_gradient sub tan tanh xor zeta
"""


def _axes(eqn) -> Labelling | None:
    if is_placed(eqn.params):
        return None
    rank = len(eqn.outvars[0].aval.shape)
    if any(len(v.aval.shape) not in (0, rank) for v in (*eqn.invars, *eqn.outvars)):
        return None
    return same_axes(eqn)


ELEMENTWISE = frozenset(getattr(p, f"{name}_p") for name in _NAMES.split() if hasattr(p, f"{name}_p"))
"""The elementwise primitives that this JAX has: a few exist in one version only."""

TRANSCENDENTAL = ELEMENTWISE & {
    p.acos_p, p.acosh_p, p.asin_p, p.asinh_p, p.atan_p, p.atan2_p, p.atanh_p, p.cbrt_p, p.cos_p, p.cosh_p, p.digamma_p,
    p.erf_p, p.erf_inv_p, p.erfc_p, p.exp_p, p.exp2_p, p.expm1_p, p.lgamma_p, p.log_p, p.log1p_p, p.logistic_p, p.pow_p,
    p.sin_p, p.sinh_p, p.tan_p, p.tanh_p,
}  # fmt: skip
"""Primitives that take many instructions for each number."""

for _primitive in sorted(ELEMENTWISE, key=str):
    register_rule(_primitive, Rule(_axes))
