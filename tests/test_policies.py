"""What is believed of devices, and what a function under a policy other than 'auto' becomes."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIRST, LAST, close, conv, normal
from jax import lax
from made_up import not_asked

from jaxlayout import LayoutPolicy, Options, Plan, auto_layout
from jaxlayout.convs.primitive import CONVOLUTIONS, tuned_conv, tuned_conv_p
from jaxlayout.convs.signature import written_dims
from jaxlayout.graph.plan import Conversion
from jaxlayout.graph.program import count_transposes, equations
from jaxlayout.layout import ConvDimensionNumbers, KernelLayout
from jaxlayout.tuning.forced import OTHERS

CUDNN = "NHWC,OHWI->NHWC"


def device(platform: str, kind: str = "", capability: str | None = None) -> Any:
    more = {} if capability is None else {"compute_capability": capability}
    return SimpleNamespace(platform=platform, device_kind=kind, **more)


# Devices


@pytest.mark.parametrize(
    ("found", "float32", "bfloat16", "volume"),
    [
        (device("gpu", "NVIDIA H200", "9.0"), CUDNN, CUDNN, "NDHWC,ODHWI->NDHWC"),
        (device("gpu", "NVIDIA H200"), CUDNN, CUDNN, "NDHWC,ODHWI->NDHWC"),
        (device("cuda", "NVIDIA B200", "10.0"), CUDNN, CUDNN, "NDHWC,ODHWI->NDHWC"),
        (device("gpu", "NVIDIA GB200"), CUDNN, CUDNN, "NDHWC,ODHWI->NDHWC"),
        (device("gpu", "NVIDIA H100 80GB HBM3"), CUDNN, CUDNN, "NDHWC,ODHWI->NDHWC"),
        (device("gpu", "NVIDIA A100-SXM4-80GB", "8.0"), FIRST, CUDNN, "NCDHW,OIDHW->NCDHW"),
        (device("gpu", "NVIDIA A100-SXM4-80GB"), FIRST, CUDNN, "NCDHW,OIDHW->NCDHW"),
        (device("gpu", "Tesla P100", "6.0"), FIRST, FIRST, "NCDHW,OIDHW->NCDHW"),
        (device("rocm", "AMD Instinct MI300X", "gfx942"), FIRST, FIRST, "NCDHW,OIDHW->NCDHW"),
        (device("gpu", "AMD Instinct MI300X"), FIRST, FIRST, "NCDHW,OIDHW->NCDHW"),
        (device("tpu", "TPU v5 lite"), LAST, LAST, "NDHWC,DHWIO->NDHWC"),
        (device("cpu", "cpu"), LAST, LAST, "NDHWC,DHWIO->NDHWC"),
        (device("something new"), LAST, LAST, "NDHWC,DHWIO->NDHWC"),
    ],
)
def test_devices_prefer_layouts_by_dtype(found, float32, bfloat16, volume):
    policy = LayoutPolicy.for_device(found)
    assert str(policy.preferred(2)) == str(policy.preferred(2, jnp.float32)) == float32
    assert str(policy.preferred(2, jnp.bfloat16)) == str(policy.preferred(2, jnp.float16)) == bfloat16
    assert str(policy.preferred(3, jnp.bfloat16)) == volume
    assert str(policy.preferred(1)) == float32.replace("H", "")
    gpu = found.platform in ("gpu", "cuda", "rocm")
    assert str(policy.preferred(2, jnp.float64)) == (FIRST if gpu else LAST)
    assert str(policy.last(2)) in (LAST, CUDNN)
    assert 0 < policy.conversion_ns(1000) < policy.conversion_ns(2000)


@pytest.mark.parametrize(
    ("machine", "name"), [("x86_64", "x86"), ("AMD64", "x86"), ("aarch64", "arm"), ("arm64", "arm")]
)
def test_processors_by_their_architecture(monkeypatch, machine, name):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert LayoutPolicy.for_device(device("cpu")).name == name
    assert LayoutPolicy.for_device() == LayoutPolicy.for_device(jax.devices()[0])


def test_the_preferred_layouts_are_believed_to_be_faster():
    policy = LayoutPolicy.for_device(device("gpu", "NVIDIA A100", "8.0"))
    first, last = ConvDimensionNumbers.parse(FIRST), ConvDimensionNumbers.parse(CUDNN)
    for dtype, better, worse in ((jnp.float32, first, last), (jnp.bfloat16, last, first)):
        times = [policy.conv_ns("dense", "xla", dims, 10**9, 10**6, dtype) for dims in (better, worse)]
        assert times[0] < times[1]


def test_what_a_device_prefers_is_a_candidate(monkeypatch):
    """Although no lowering offers OHWI."""
    hopper = replace(LayoutPolicy.for_device(device("gpu", "NVIDIA H200", "9.0")), other_order=100.0)
    monkeypatch.setattr(LayoutPolicy, "for_device", lambda device=None: hopper)
    f = auto_layout(conv, on_miss="heuristic", verdict=False, memory_limit=1000.0)
    close(f(X, KERNELS[0]), conv(X, KERNELS[0]))
    assert f.outcome(X, KERNELS[0]).source == "heuristic"
    assert ways(f.trace(X, KERNELS[0]).jaxpr) == [f"xla:{CUDNN}"]


def test_policies_of_one_s_own():
    assert str(LayoutPolicy(name="mine", channels_last=False).preferred(3)) == "NCDHW,OIDHW->NCDHW"
    mine = LayoutPolicy(name="mine", channels_last=lambda spatial, dtype: spatial == 1, kernel=KernelLayout.oi_first)
    assert [str(mine.preferred(n)) for n in (1, 2)] == ["NWC,OIW->NWC", FIRST]
    assert str(mine.last(2)) == "NHWC,OIHW->NHWC"


# Functions


def net(x: Any, *kernels: Any) -> Any:
    for k in kernels:
        x = jnp.maximum(conv(x, k), 0)
    return x


X = normal(0, 2, 4, 8, 7)
KERNELS = [normal(i, 4, 4, 3, 3) for i in range(3)]


@pytest.fixture
def unmeasured(monkeypatch):
    """Nothing may be measured, judged or asked of the table."""
    for name in ("pipeline.measure", "pipeline.open_table", "model.open_table", "pipeline.Turns", "verifier.accept"):
        monkeypatch.setattr(f"jaxlayout.tuning.{name}", not_asked)
    yield
    assert not Path(os.environ["JAXLAYOUT_TABLE"]).exists()


def ways(jaxpr: Any) -> list[str]:
    """The layouts and lowering of every convolution."""
    found = [eqn for eqn in equations(jaxpr) if eqn.primitive in CONVOLUTIONS]
    return [f"{eqn.params.get('lowering', 'xla')}:{written_dims(eqn.params)}" for eqn in found]


def test_off_is_plain_jit(unmeasured):
    f = auto_layout(net, policy="off")
    assert str(f.trace(X, *KERNELS).jaxpr) == str(jax.jit(net).trace(X, *KERNELS).jaxpr)
    close(f(X, *KERNELS), net(X, *KERNELS))
    outcome = f.outcome(X, *KERNELS)
    assert not outcome.kept and outcome.plan.trivial and outcome.source == "none"
    assert "policy 'off'" in outcome.verdict.reason and "policy 'off'" in str(f.explain(X, *KERNELS))
    gradient = jax.make_jaxpr(jax.grad(lambda *args: f(*args).sum()))(X, *KERNELS)
    batch = jax.make_jaxpr(jax.vmap(f, (None, 0, 0, 0)))(X, *(k[None] for k in KERNELS))
    assert not any(eqn.primitive is tuned_conv_p for eqn in (*equations(gradient), *equations(batch)))
    frozen = f.freeze(X)
    close(frozen(*KERNELS), net(X, *KERNELS))
    assert "policy 'off'" in frozen.outcome(*KERNELS).verdict.reason


def test_off_wins_over_a_pinned_plan(unmeasured):
    pinned = Plan(choices={(99,): None}, compiler_options={"xla_cpu_experimental_ynn_fusion_type": "none such"})  # pyright: ignore
    f = auto_layout(net, policy="off", plan=pinned)
    close(f(X, *KERNELS), net(X, *KERNELS))


def test_the_environment_sets_the_policy(monkeypatch, unmeasured):
    monkeypatch.setenv("JAXLAYOUT_POLICY", "off")
    assert auto_layout(net).options == Options(policy="off", table=os.environ["JAXLAYOUT_TABLE"])
    assert auto_layout(net, policy="auto").options.policy == "auto"
    monkeypatch.setenv("JAXLAYOUT_POLICY", "nchw")
    with pytest.raises(ValueError, match=r"JAXLAYOUT_POLICY='nchw'.*one of auto, channels_last, off"):
        auto_layout(net)


def test_channels_last_is_forced_without_measuring(unmeasured):
    f = auto_layout(net, policy="channels_last")
    jaxpr = f.trace(X, *KERNELS).jaxpr
    assert ways(jaxpr) == [f"xla:{LAST}"] * 3
    assert count_transposes(jaxpr) == 5  # of the input, each kernel, and the result
    close(f(X, *KERNELS), net(X, *KERNELS))
    outcome = f.outcome(X, *KERNELS)
    assert outcome.kept and outcome.source == "forced" and outcome.verdict.cause == "untried"
    assert outcome.verdict.reason.startswith("forced by policy 'channels_last'")
    assert outcome.verdict.ratio is None and outcome.measured == 0
    text = str(f.explain(X, *KERNELS))
    assert "forced by policy 'channels_last': neither timed nor compared, and maybe slower" in text
    assert "measured costs" not in text  # there are none


def test_what_is_channels_last_stays(unmeasured):
    def nhwc(x, k):
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, k = X.transpose(0, 2, 3, 1), KERNELS[0].transpose(2, 3, 1, 0)
    f = auto_layout(nhwc, policy="channels_last")
    close(f(x, k), nhwc(x, k))
    outcome = f.outcome(x, k)
    assert not outcome.kept and "every convolution is channels last as written" in outcome.verdict.reason
    assert str(f.trace(x, k).jaxpr) == str(jax.jit(nhwc).trace(x, k).jaxpr)


def test_small_images_are_not_taken_for_kernel_gradients(unmeasured):
    """A convolution with fewer positions than taps is like one in its signature."""
    small = X[:, :, :2, :2]
    f = auto_layout(net, policy="channels_last")
    assert ways(f.trace(small, *KERNELS).jaxpr) == [f"xla:{LAST}"] * 3
    close(f(small, *KERNELS), net(small, *KERNELS))


def test_without_convolutions_there_is_nothing_to_force(unmeasured):
    f = auto_layout(lambda x: x + 1, policy="channels_last")
    assert f.outcome(X).verdict.reason == "it has no convolution"


def test_a_shared_tensor_is_converted_once(unmeasured):
    def fork(x, *kernels):
        return sum(conv(x, k) for k in kernels)

    f = auto_layout(fork, policy="channels_last")
    jaxpr = f.trace(X, *KERNELS).jaxpr
    assert count_transposes(jaxpr) == 1 + 3 + 1
    close(f(X, *KERNELS), fork(X, *KERNELS))


def conversions_of(fun: Any, *args: Any) -> list[Conversion]:
    """Of values, not of kernels."""
    f = auto_layout(fun, policy="channels_last")
    close(f(*args), fun(*args))
    return [c for c in f.plan(*args).conversions if c.shape[2:] != (3, 3)]


def test_a_conversion_comes_before_padding_and_widening(unmeasured):
    """Where it costs the least, and fuses with what computes the value."""

    def padded(x, k):
        x = jnp.sin(x)
        return conv(lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 0), (2, 3, 0), (2, 3, 0))), k, strides=2)

    entering, leaving = conversions_of(padded, X, KERNELS[0])
    assert entering.shape == X.shape and leaving.shape == (2, 4, 7, 6)
    eqns = auto_layout(padded, policy="channels_last").trace(X, KERNELS[0]).jaxpr.eqns
    makers = {var: eqn.primitive.name for eqn in eqns for var in eqn.outvars}
    moved = [eqn.invars[0] for eqn in eqns if eqn.primitive.name == "transpose"]
    assert [makers[var] for var in moved if var.aval.shape == X.shape] == ["sin"]

    def widened(x, k):
        return conv(jnp.sin(x).astype(jnp.float32), k)

    entering, _ = conversions_of(widened, X.astype(jnp.bfloat16), KERNELS[0])
    assert entering.dtype == "bfloat16"

    def broadcast(x, k):
        return conv(jnp.broadcast_to(jnp.sin(x), (2, 4, 8, 7)), k)

    assert [c.shape for c in conversions_of(broadcast, X[:1], KERNELS[0])] == [(1, 4, 8, 7), X.shape]


def test_a_user_s_transposes_are_absorbed(unmeasured):
    def torch_like(x, k):
        return conv(x.transpose(0, 3, 1, 2), k).transpose(0, 2, 3, 1)

    f = auto_layout(torch_like, policy="channels_last")
    x = X.transpose(0, 2, 3, 1)
    jaxpr = f.trace(x, KERNELS[0]).jaxpr
    assert count_transposes(jaxpr) == 1  # of the kernel
    close(f(x, KERNELS[0]), torch_like(x, KERNELS[0]))


def test_derived_convolutions_are_channels_last_too(unmeasured):
    f = auto_layout(lambda x, *kernels: net(x, *kernels).sum(), policy="channels_last")
    plain = jax.grad(lambda x, *kernels: net(x, *kernels).sum(), argnums=(0, 1))
    close(jax.grad(f, argnums=(0, 1))(X, *KERNELS), plain(X, *KERNELS))
    text = jax.jit(jax.grad(f, argnums=(0, 1))).lower(X, *KERNELS).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(lines) == 3 + 4
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in lines)


def test_whole_training_steps_and_loops(unmeasured):
    def step(k, x):
        loss, gradient = jax.value_and_grad(lambda k: (conv(conv(x, k), k) ** 2).mean())(k)
        return k - 0.1 * gradient, loss

    def train(k, xs):
        return lax.scan(step, k, xs)

    f = auto_layout(train, policy="channels_last")
    xs = normal(1, 3, 2, 4, 8, 7)
    found = ways(f.trace(KERNELS[0], xs).jaxpr)
    assert len(found) >= 5 and set(found) == {f"xla:{LAST}"}
    close(f(KERNELS[0], xs), train(KERNELS[0], xs))
    assert auto_layout(train, policy="channels_last")(KERNELS[0], xs[:0])[1].shape == (0,)
    f = auto_layout(step, policy="channels_last")  # in the entry computation a kernel gradient stays as autodiff has it
    assert set(ways(f.trace(KERNELS[0], X).jaxpr)) == {f"xla:{LAST}", f"xla:{ConvDimensionNumbers.kernel_gradient(2)}"}
    close(f(KERNELS[0], X), step(KERNELS[0], X))


def test_other_ranks_groups_and_dtypes(unmeasured):
    cases = [((2, 4, 9), (6, 2, 3), 2, np.float32), ((2, 4, 5, 6, 7), (8, 1, 3, 3, 3), 4, np.float32)]
    for lhs, rhs, groups, dtype in [*cases, ((2, 4, 8, 7), (4, 4, 1, 1), 1, jnp.bfloat16)]:
        x, k = normal(0, *lhs).astype(dtype), normal(1, *rhs).astype(dtype)

        def fun(x, k, groups=groups):
            return lax.conv_general_dilated(x, k, (1,) * (x.ndim - 2), "SAME", feature_group_count=groups)

        f = auto_layout(fun, policy="channels_last")
        assert ways(f.trace(x, k).jaxpr) == [f"xla:{ConvDimensionNumbers.channels_last(len(lhs) - 2)}"]
        found, wanted = (np.asarray(one(x, k), np.float32) for one in (f, fun))
        np.testing.assert_allclose(found, wanted, rtol=2e-2 if dtype != np.float32 else 1e-4, atol=1e-4)


def test_frozen_weights_are_converted_once_and_not_folded(unmeasured):
    def scaled(params, x):
        return conv(x, params["k"]) * params["s"][:, None, None]

    params = {"k": KERNELS[0], "s": normal(3, 4)}
    f = auto_layout(scaled, policy="channels_last").freeze(params)
    close(f(X), scaled(params, X))
    outcome = f.outcome(X)
    assert outcome.kept and outcome.source == "forced" and not outcome.folded
    jaxpr = f.trace(X).jaxpr
    assert ways(jaxpr) == [f"xla:{LAST}"] and count_transposes(jaxpr) == 2


def test_a_lowering_that_was_chosen_inside_stays(unmeasured):
    args = X, KERNELS[0], KERNELS[1][:, :, :1, :1]
    (eqn,) = jax.make_jaxpr(conv)(X, args[2]).eqns
    outer = auto_layout(
        lambda x, k, one: conv(tuned_conv(x, one, lowering="dot", **eqn.params), k), policy="channels_last"
    )
    assert ways(outer.trace(*args).jaxpr) == [f"dot:{FIRST}", f"xla:{LAST}"]
    close(outer(*args), conv(conv(X, args[2]), args[1]))


def test_symbolic_shapes_are_left_alone(unmeasured):
    f = auto_layout(net, policy="channels_last")
    (b,) = jax.export.symbolic_shape("b")
    abstract = jax.ShapeDtypeStruct((b, *X.shape[1:]), X.dtype), *KERNELS
    assert f.outcome(*abstract).verdict.reason == "its shapes are symbolic"
    close(jax.export.export(f)(*abstract).call(X, *KERNELS), net(X, *KERNELS))


def test_a_forced_plan_is_pinned(unmeasured, tmp_path):
    f = auto_layout(net, policy="channels_last")
    f.plan(X, *KERNELS).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == f.plan(X, *KERNELS)
    for options in ({}, {"policy": "channels_last"}):
        pinned = auto_layout(net, plan=plan, **options)
        assert pinned.outcome(X, *KERNELS).source == "pinned"
        assert str(pinned.trace(X, *KERNELS).jaxpr) == str(f.trace(X, *KERNELS).jaxpr)


def test_effects_happen_as_often(unmeasured, capfd):
    def talks(x, k):
        y = conv(x, k)
        jax.debug.print("{}", y.shape[0])
        return y

    f = auto_layout(talks, policy="channels_last")
    close(f(X, KERNELS[0]), conv(X, KERNELS[0]))
    jax.effects_barrier()
    assert f.outcome(X, KERNELS[0]).kept and capfd.readouterr().out == "2\n"


# The gate


def among(others: int, convolutions: int) -> Any:
    """So many convolutions among so many other equations on arrays."""

    def fun(x, k):
        for _ in range(convolutions):
            x = conv(x, k)
        for i in range(others // 2):
            x = jnp.sin(x) * (1.0 + i)
        return x

    return fun


@pytest.mark.parametrize(
    ("convolutions", "others", "rewritten"),
    [
        (1, 0, True),
        (20, 2, True),
        (20, 4 * OTHERS, True),
        (1, OTHERS, True),
        (1, OTHERS + 2, False),
        (1, 400, False),
        (3, 400, False),
    ],
)
def test_a_program_of_few_convolutions_among_many_others_is_left_alone(unmeasured, convolutions, others, rewritten):
    fun = among(others, convolutions)
    x, k = X * 1e-3, KERNELS[0] * 1e-2
    f = auto_layout(fun, policy="channels_last")
    outcome = f.outcome(x, k)
    assert outcome.kept == rewritten
    if not rewritten:
        expected = f"at least one convolution for each {OTHERS} other equations: here are {convolutions} among {others}"
        assert expected in outcome.verdict.reason
        assert str(f.trace(x, k).jaxpr) == str(jax.jit(fun).trace(x, k).jaxpr)
        gradient = jax.make_jaxpr(jax.grad(lambda x: f(x, k).sum()))(x)
        assert not any(eqn.primitive is tuned_conv_p for eqn in equations(gradient))  # nor is what is derived


def test_the_gate_counts_what_loops_run_and_no_vectors(unmeasured):
    def loop(x, k):
        x = lax.fori_loop(0, 4 * OTHERS, lambda i, x: x * 0.5, x)
        return conv(x, k)

    def convolving(x, k):
        x = among(3 * OTHERS, 0)(x, k)
        return lax.scan(lambda x, _: (conv(x, k), None), x, length=10)[0]

    def small(x, k, b):
        for _ in range(3 * OTHERS):
            b = jnp.sin(b)
        return conv(x, k) + b[:, None, None]

    left, *rewritten = [auto_layout(fun, policy="channels_last") for fun in (loop, convolving, small)]
    assert not left.outcome(X, KERNELS[0]).kept
    assert rewritten[0].outcome(X, KERNELS[0]).kept
    assert rewritten[1].outcome(X, KERNELS[0], normal(0, 4)).kept


def test_the_gate_is_for_the_forced_policy_alone(forced):
    fun = among(3 * OTHERS, 1)
    assert not auto_layout(fun, policy="channels_last").outcome(X, KERNELS[0]).kept
    assert auto_layout(fun).outcome(X, KERNELS[0]).kept
