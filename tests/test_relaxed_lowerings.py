"""The relaxed lowerings: as accurate as they say against the reference, and offered only where that is asked for.

Errors are counted in the root mean square of a sum of K products, which for normal operands is sqrt(K): a tile or a
transform adds the same noise to an output that is small by chance, or that reads padding alone.
"""

import math
from functools import partial

import jax
import numpy as np
import pytest
from drawing import examples
from hypothesis import example, given
from hypothesis import strategies as st
from jax import lax
from jax import numpy as jnp
from signatures import DENSE, LARGE, last, operands, plain, signature, through
from test_primitive import rebound
from toys import offer, tempt

from jaxlayout import auto_layout
from jaxlayout.convs.candidates import Candidate, candidates
from jaxlayout.convs.lowering import is_relaxed, lowerings
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.program import equations
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout
from jaxlayout.measure.reference import reference

RELAXED = {name: lowering for name, lowering in lowerings().items() if lowering.relaxed}
TOLERANCE = {"winograd2": 1e-5, "winograd4": 1e-4, "fft": 1e-5}
"""In float32; in float64 smaller by the ratio of their eps."""
SAME = ((1, 1), (1, 1))


def orders(name, c):
    """Those it is native in, with the two common kernel orders and an odd one where it takes any."""
    for dims in RELAXED[name].dimension_numbers(c):
        kernels = [dims.rhs]
        if RELAXED[name].any_kernel:
            odd = KernelLayout("I" + dims.rhs.spatial[::-1] + "O")
            kernels = dict.fromkeys([dims.rhs, KernelLayout.io_last(c.rank), odd])
        yield from (ConvDimensionNumbers(dims.lhs, rhs, dims.out) for rhs in kernels)


def outs(name, c, lhs, rhs, inner=""):
    """What it gives in each order, from one compilation."""
    assert list(RELAXED[name].dimension_numbers(c)), c.key

    @jax.jit
    def run(lhs, rhs):
        return {str(dims): through(name + inner, c, dims, lhs, rhs) for dims in orders(name, c)}

    return jax.tree.map(np.asarray, run(lhs, rhs))


def assert_accurate(name, c, inner="", tolerance=None):
    lhs, rhs = operands(c, draw=lambda rng, shape: rng.standard_normal(shape))
    exact = reference(c, lhs, rhs)
    eps = np.finfo(c.accumulator).eps / np.finfo(np.float32).eps
    bound = (tolerance or TOLERANCE[name]) * eps * math.sqrt(c.contraction)
    if c.out_dtype != c.accumulator:  # rounded once more
        bound = bound + jnp.finfo(c.out_dtype).eps * np.abs(exact)
    with jax.enable_x64(c.out_dtype == np.float64):
        for dims, out in outs(name, c, lhs, rhs, inner).items():
            assert (np.abs(out.astype(np.float64) - exact) <= bound).all(), dims


@st.composite
def windows(draw, dtypes=("float32", "float64", "float16", "bfloat16")):
    """3x3 convolutions in tiles that fit and tiles that do not."""
    sides = tuple(draw(st.integers(3, 11)) for _ in range(2))
    padding = tuple((draw(st.integers(-2, 3)), draw(st.integers(-2, 3))) for _ in range(2))
    sizes = tuple(out + 2 - lo - hi for out, (lo, hi) in zip(sides, padding, strict=True))
    sizes = tuple(max(1, size) for size in sizes)
    features, out = draw(st.integers(8, 11)), draw(st.integers(8, 11))
    shapes = (draw(st.integers(0, 2)), *sizes, features), (3, 3, features, out)
    return signature(*shapes, padding=padding, dtype=draw(st.sampled_from(dtypes)))


@examples(25)
@given(windows())
def test_winograd_is_accurate(c):
    for name in ("winograd2", "winograd4"):
        assert_accurate(name, c)


@examples(15)
@given(windows(dtypes=("float32", "float16", "bfloat16")))
def test_winograd2_is_exact_on_small_integers(c):
    """Its constants are powers of two; half precision, then, is rounded once."""
    lhs, rhs = operands(c)
    expected = np.asarray(jax.jit(lambda lhs, rhs: plain(c, lhs, rhs))(lhs, rhs))
    for dims, out in outs("winograd2", c, lhs, rhs).items():
        np.testing.assert_array_equal(out, expected, err_msg=dims)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["winograd2", "winograd4"])
def test_not_a_number_spreads_over_its_tiles(name, bad):
    c = signature((1, 16, 16, 8), (3, 3, 8, 8), padding=SAME)
    lhs, rhs = operands(c)
    lhs[0, 6, 9, 3] = bad
    expected = np.isfinite(plain(c, lhs, rhs))
    tile = {"winograd2": 2, "winograd4": 4}[name]
    near = [np.abs(np.arange(16) - at) < tile + 2 for at in (6, 9)]
    (out,) = {np.isfinite(out).tobytes() for out in outs(name, c, lhs, rhs).values()}
    finite = np.frombuffer(out, bool).reshape(expected.shape)
    assert not (finite & ~expected).any()
    assert (finite | (near[0][:, None] & near[1])[None, :, :, None]).all()


@st.composite
def large_kernels(draw):
    """Of at least 121 taps for each output of the dense result, and at least 121 outputs."""
    rank, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(("float32", "float64")))
    kind = draw(st.sampled_from(("dense", "depthwise", "grouped", "batch", "gradient")))
    small, side = {1: (121, 130), 2: (11, 13), 3: (5, 6)}[rank], {1: 121, 2: 11, 3: 5}[rank]
    kernel = [draw(st.integers(*small)) for _ in range(rank)]
    size = [draw(st.integers(side, side + 3)) for _ in range(rank)]
    if kind == "gradient":
        kernel = [k + 5 for k in kernel]
    strides, steps = [1] * rank, [1] * rank
    if draw(st.booleans()) and rank < 3:
        axis = draw(st.integers(0, rank - 1))
        strides[axis], kernel[axis] = 2, 2 * kernel[axis]
    if draw(st.booleans()):
        steps[draw(st.integers(0, rank - 1))] = 2
    padding = [(draw(st.integers(-2, 3)), draw(st.integers(-2, 3))) for _ in range(rank)]
    axes = zip(size, strides, kernel, steps, padding, strict=True)
    spatial = [(o - 1) * s + (k - 1) * d + 1 - lo - hi for o, s, k, d, (lo, hi) in axes]
    features, out, batch = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    groups = batch_groups = 1
    if kind == "depthwise":
        groups, out = features, out * features
    elif kind == "grouped":
        groups, features, out = 2, 2 * features, 2 * out
    elif kind in ("batch", "gradient"):
        batch_groups = draw(st.integers(1, 3))
        batch, out = batch * batch_groups, out * batch_groups
    return signature(
        (batch, *spatial, features),
        (*kernel, features // groups, out),
        dtype=dtype,
        groups=groups,
        batch_groups=batch_groups,
        strides=tuple(strides),
        rhs_dilation=tuple(steps),
        padding=tuple(padding),
    )


@examples(25)
@given(large_kernels())
def test_fft_is_accurate(c):
    assert_accurate("fft", c)


@st.composite
def stems(draw):
    rank, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(("float32", "float64", "bfloat16", "int32", "int8")))
    step = draw(st.integers(2, 4 if rank < 3 else 2))
    kernel = tuple(draw(st.integers(step, step + (5 if rank < 3 else 2))) for _ in range(rank))
    padding = tuple((draw(st.integers(-2, 3)), draw(st.integers(-2, 3))) for _ in range(rank))
    spatial = tuple(draw(st.integers(4, 15 if rank < 3 else 7)) for _ in range(rank))
    features, out = draw(st.integers(1, 4)), draw(st.integers(0, 5))
    shapes = (draw(st.integers(0, 2)), *spatial, features), (*kernel, features, out)
    return signature(*shapes, strides=(step,) * rank, padding=padding, dtype=dtype)


@st.composite
def narrow_groups(draw):
    """Of 2 to 8 features; in gradients to the input, of as many as there are out features of a group."""
    rank, dtype = draw(st.integers(0, 3)), draw(st.sampled_from(("float32", "float64", "bfloat16", "int32", "int8")))
    features = draw(st.integers(2, 8))
    groups = draw(st.sampled_from([n for n in (2, 3, 4, 6, 8, 9) if n * features >= 16]))

    def per_axis(values):
        return tuple(draw(values) for _ in range(rank))

    size, dilations = st.integers(4, 7 if rank < 3 else 5), per_axis(st.integers(1, 2))
    padding, kernel = per_axis(st.tuples(st.integers(-1, 2), st.integers(-1, 2))), per_axis(st.integers(1, 3))
    return signature(
        (draw(st.integers(0, 2)), *per_axis(size), features * groups),
        (*kernel, features, groups * draw(st.integers(1, 3))),
        groups=groups,
        strides=per_axis(st.integers(1, 2)),
        padding=padding,
        dtype=dtype,
        **draw(st.sampled_from([{"lhs_dilation": dilations}, {"rhs_dilation": dilations}, {}])),
    )


def assert_exact(name, c):
    """On small integers, with XLA's convolution inside and with others."""
    lhs, rhs = operands(c)
    with jax.enable_x64(c.out_dtype == np.float64):
        expected = np.asarray(jax.jit(lambda lhs, rhs: plain(c, lhs, rhs))(lhs, rhs))
        found = {inner for dims in orders(name, c) for inner in inside(name, c, dims)}
        assert "xla" in found
        for inner in sorted(found):
            for dims, out in outs(name, c, lhs, rhs, "/" + inner).items():
                np.testing.assert_array_equal(out, expected, err_msg=f"{inner} {dims}")


def inside(name, c, dims):
    """The strict lowerings that fit in a relaxed one."""
    inner = [full.partition("/")[2] for full in RELAXED[name].names(c, dims)]
    return [full for full in inner if not is_relaxed(full)]


@examples(25)
@given(stems())
def test_space_to_depth_equals_lax(c):
    assert_exact("space_to_depth", c)


@examples(25)
@given(narrow_groups())
@example(signature((2, 8, 8, 24), (3, 3, 8, 9), groups=3, padding=SAME))  # all of them one
@example(signature((2, 8, 8, 36), (3, 3, 2, 54), groups=18, padding=SAME))  # nine at a time
def test_merged_equals_lax(c):
    assert_exact("merged", c)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_spreads_to_the_groups_merged_with_its(bad):
    c = signature((1, 6, 6, 32), (3, 3, 4, 32), groups=8, padding=SAME)
    lhs, rhs = operands(c)
    lhs[0, 3, 3, 17] = bad  # of the second half of the groups
    for out in outs("merged", c, lhs, rhs, "/groups/xla").values():
        assert np.isfinite(out[..., :16]).all() and not np.isfinite(out[0, 3, 3, 16:]).any()
        assert np.isfinite(out[0, :2]).all()
    lhs, rhs = operands(c)
    rhs[1, 1, 0, 5] = bad  # a weight's own out feature alone
    for out in outs("merged", c, lhs, rhs, "/groups/xla").values():
        assert np.isfinite(np.delete(out, 5, -1)).all()


def test_relaxed_lowerings_inside_others():
    stem = signature((1, 17, 16, 3), (6, 5, 3, 8), strides=(2, 2), padding=SAME)
    assert "space_to_depth/winograd2" in RELAXED["space_to_depth"].names(stem, last(2))
    assert_accurate("space_to_depth", stem, "/winograd2", TOLERANCE["winograd2"])
    assert_accurate("space_to_depth", stem, "/im2col", 1e-6)


STEM = ((2, 16, 16, 3), (7, 7, 3, 4))


@pytest.mark.parametrize(
    ("c", "offered"),
    [
        (signature(*DENSE), "winograd2 winograd4"),
        (signature(*DENSE, dtype="bfloat16"), "winograd2 winograd4"),
        (signature(*DENSE, dtype="bfloat16", preferred_element_type=np.dtype("float32")), "winograd2 winograd4"),
        (signature(*DENSE, padding=((-1, 3), (2, -2))), "winograd2 winograd4"),
        (signature(*DENSE, dtype="int32"), ""),
        (signature(*DENSE, dtype="complex64"), ""),
        (signature(*DENSE, strides=(1, 2)), ""),
        (signature(*DENSE, lhs_dilation=(2, 1)), ""),
        (signature(*DENSE, rhs_dilation=(1, 2)), ""),
        (signature((2, 9, 9, 16), (3, 3, 8, 8), groups=2), "merged"),
        (signature((2, 9, 9, 8), (3, 3, 8, 8), batch_groups=2), ""),
        (signature((2, 9, 9, 8), (3, 3, 8, 7)), ""),
        (signature((2, 9, 9, 7), (3, 3, 7, 8)), ""),
        (signature((2, 9, 9, 8), (3, 2, 8, 8)), ""),
        (signature((2, 4, 4, 8), (3, 3, 8, 8)), ""),  # fewer outputs than taps
        (signature((2, 9, 8), (3, 8, 8)), ""),
        (signature((2, 9, 9, 9, 8), (3, 3, 3, 8, 8)), ""),
        (signature(*LARGE), "fft"),
        (signature(*LARGE, dtype="float64"), "fft"),
        (signature((2, 24, 24, 3), (11, 11, 1, 3), groups=3), "fft"),
        (signature((2, 24, 24, 3), (11, 11, 3, 4), batch_groups=2), "fft"),
        (signature((2, 24, 24, 3), (14, 14, 3, 4)), "fft"),
        (signature((2, 300, 2), (121, 2, 3)), "fft"),
        (signature((2, 10, 10, 10, 2), (5, 5, 5, 2, 3)), "fft"),
        (signature(*LARGE, rhs_dilation=(1, 2), padding=((0, 0), (5, 5))), "fft"),
        (signature(*LARGE, dtype="bfloat16"), ""),
        (signature(*LARGE, dtype="complex64"), ""),
        (signature(*LARGE, lhs_dilation=(1, 2)), ""),
        (signature(*LARGE, strides=(1, 2)), ""),
        (signature((2, 24, 24, 2), (11, 10, 2, 3)), ""),
        (signature((2, 24, 24, 2), (15, 15, 2, 3)), ""),  # a gradient to a small kernel
        (signature((2, 512, 512, 64), (11, 11, 64, 64)), ""),  # spectra of gigabytes
        (signature((2, 4, 4, 4, 4, 2), (3, 3, 4, 4, 2, 3)), ""),
        (signature(*STEM, strides=(2, 2)), "space_to_depth"),
        (signature(*STEM, strides=(2, 2), dtype="int8"), "space_to_depth"),
        (signature(*STEM, strides=(7, 7)), "space_to_depth"),
        (signature((2, 16, 4), (3, 4, 5), strides=(3,)), "space_to_depth"),
        (signature(*STEM), ""),
        (signature(*STEM, strides=(2, 1)), ""),
        (signature(*STEM, strides=(8, 8)), ""),
        (signature(*STEM, strides=(2, 2), rhs_dilation=(2, 2)), ""),
        (signature(*STEM, strides=(2, 2), lhs_dilation=(3, 3)), ""),
        (signature((2, 16, 16, 5), (7, 7, 5, 4), strides=(2, 2)), ""),
        (signature((2, 16, 16, 4), (7, 7, 1, 4), strides=(2, 2), groups=4), ""),
        (signature((2, 9, 9, 32), (3, 3, 8, 32), groups=4), "merged"),
        (signature((2, 9, 16), (3, 2, 8), groups=8, strides=(2,), dtype="int8"), "merged"),
        (signature((2, 9, 9, 64), (3, 3, 16, 64), groups=4), ""),
        (signature((2, 9, 9, 14), (3, 3, 2, 14), groups=7), ""),
        (signature((2, 16, 16, 4), (7, 7, 4, 4), strides=(2, 2), batch_groups=2), ""),
    ],
    ids=lambda value: value.key if isinstance(value, ConvSignature) else value.replace(" ", "-"),
)
def test_offers(c, offered):
    assert {name for name, lowering in RELAXED.items() if any(lowering.dimension_numbers(c))} == set(offered.split())
    for lowering in RELAXED.values():
        dims = list(lowering.dimension_numbers(c))
        assert len(dims) == len(set(dims))


@pytest.mark.parametrize(
    ("c", "offered"),
    [
        (signature(*DENSE), "winograd4"),
        (signature(*LARGE), "fft"),
        (signature(*STEM, strides=(2, 2)), "space_to_depth/tap_dots"),
        (signature((2, 9, 9, 8), (6, 6, 8, 8), lhs_dilation=(2, 2), padding=((4, 4), (4, 4))), "phases/winograd2"),
        (signature((2, 9, 9, 16), (3, 3, 8, 16), groups=2), "groups/winograd4"),
        (signature((2, 9, 9, 32), (3, 3, 8, 32), groups=4), "merged/groups/xla"),
        (signature((2, 5, 9, 9, 8), (3, 3, 3, 8, 8)), "planes/winograd2"),
    ],
    ids=lambda value: value.key if isinstance(value, ConvSignature) else value,
)
def test_offered_only_under_relaxed_numerics(c, offered):
    """Inside a strict composite too."""
    written = Candidate("xla", last(c.rank))
    strict, relaxed = (candidates(c, written, relaxed=asked) for asked in (False, True))
    assert offered in {way.lowering for way in relaxed}
    assert list(strict) == [way for way in relaxed if not is_relaxed(way.lowering)]
    assert len(strict) < len(relaxed)


FIRST = ConvDimensionNumbers(ConvLayout.channels_first(2), KernelLayout.oi_first(2), ConvLayout.channels_first(2))


@pytest.mark.parametrize(
    ("name", "c", "dims", "derived"),
    [
        ("winograd2", signature((2, 9, 8, 8), (3, 3, 8, 9), padding=SAME), last(2), ["winograd2", "xla"]),
        ("winograd4", signature((2, 9, 8, 8), (3, 3, 8, 9), padding=SAME), last(2), ["winograd4", "xla"]),
        ("fft", signature((2, 24, 25, 2), (12, 11, 2, 3)), FIRST, ["fft", "fft"]),
        ("fft", signature((2, 24, 25, 2), (12, 11, 1, 2), groups=2), FIRST, ["fft", "fft"]),
        (
            "space_to_depth",
            signature((2, 16, 15, 3), (7, 7, 3, 4), strides=(2, 2), padding=SAME),
            last(2),
            ["xla", "xla"],
        ),
        ("merged", signature((2, 9, 8, 32), (3, 3, 8, 32), groups=4, padding=SAME), last(2), ["xla", "xla"]),
    ],
)
def test_transformed(name, c, dims, derived):
    """A batch and a derivative are convolutions again, through the same lowering where that is native."""
    home = last(c.rank)
    lhs, rhs = operands(c)
    lhs, rhs = lhs.transpose(dims.lhs.permutation_from(home.lhs)), rhs.transpose(dims.rhs.permutation_from(home.rhs))
    params = {**c.params, "dimension_numbers": dims.to_lax()}

    def written(lhs, rhs):
        return lax.conv_general_dilated(lhs, rhs, **params)

    def tuned(lhs, rhs):
        return rebound(written, lhs, rhs, lowering=name)

    def gradient(f):
        return jax.grad(lambda lhs, rhs: (f(lhs, rhs) ** 2).sum(), (0, 1))

    def chosen(f, *args):
        eqns = list(equations(jax.make_jaxpr(f)(*args)))
        assert not any(eqn.primitive in (lax.fft_p, lax.dot_general_p) for eqn in eqns)
        return [eqn.params["lowering"] for eqn in eqns if "lowering" in eqn.params]

    def assert_close(by, *args):
        found, expected = (jax.jit(by(f))(*args) for f in (tuned, written))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())

    assert sorted(chosen(gradient(tuned), lhs, rhs)) == sorted([name, *derived])
    assert_close(gradient, lhs, rhs)
    batched = np.stack([lhs, lhs + 1])
    assert chosen(jax.vmap(tuned, (0, None)), batched, rhs) == [name]
    assert_close(lambda f: jax.vmap(f, (0, None)), batched, rhs)
    assert_close(lambda f: jax.vmap(gradient(f), (0, None)), batched, rhs)
    assert_close(jax.vmap, batched, np.stack([rhs, rhs + 1]))


TUNED = [
    ("winograd2", signature((2, 9, 8, 8), (3, 3, 8, 9), padding=SAME), last(2)),
    ("winograd4", signature((2, 9, 8, 8), (3, 3, 8, 9), padding=SAME), last(2)),
    ("fft", signature((2, 24, 25, 2), (12, 11, 2, 3)), FIRST),
    ("space_to_depth", signature((2, 16, 15, 3), (7, 7, 3, 4), strides=(2, 2), padding=SAME), last(2)),
    ("merged", signature((2, 9, 8, 32), (3, 3, 8, 32), groups=4, padding=SAME), last(2)),
]


@pytest.mark.parametrize(("name", "c", "dims"), TUNED)
def test_exported_with_a_symbolic_batch(name, c, dims):
    home = last(c.rank)
    lhs, rhs = operands(c)
    lhs, rhs = lhs.transpose(dims.lhs.permutation_from(home.lhs)), rhs.transpose(dims.rhs.permutation_from(home.rhs))
    written = partial(lax.conv_general_dilated, dimension_numbers=dims.to_lax(), **c.params)
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, {str(lhs.shape[1:])[1:-1]}"), lhs.dtype)
    exported = jax.export.export(jax.jit(lambda lhs: rebound(written, lhs, rhs, lowering=name)))(shape)
    expected = np.asarray(written(lhs, rhs))
    np.testing.assert_allclose(exported.call(lhs), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "c"), [(name, c) for name, c, _ in TUNED])
def test_tuned_and_frozen(monkeypatch, name, c):
    """Chosen under relaxed numerics, past the checks of its numbers, and prepared once; written channels first, where
    the original has temporary memory, of which the limit is a multiple."""
    offer(monkeypatch, name)
    tempt(monkeypatch)
    lhs, rhs = operands(c, draw=lambda rng, shape: rng.standard_normal(shape))
    home = last(c.rank)
    lhs, rhs = lhs.transpose(FIRST.lhs.permutation_from(home.lhs)), rhs.transpose(FIRST.rhs.permutation_from(home.rhs))

    def written(rhs, lhs):
        return lax.conv_general_dilated(lhs, rhs, dimension_numbers=FIRST.to_lax(), **c.params)

    def chosen(numerics):
        f = auto_layout(written, numerics=numerics, verdict=False, memory_limit=1000.0)
        choices = f.plan(rhs, lhs).choices.values()
        return f, {mode.candidate.lowering.partition("/")[0] for mode in choices if mode.candidate}

    assert name not in chosen("strict")[1]
    relaxed, names = chosen("relaxed")
    assert name in names and relaxed.outcome(rhs, lhs).kept
    expected = np.asarray(jax.jit(written)(rhs, lhs))
    for found in (relaxed(rhs, lhs), relaxed.freeze(rhs)(lhs)):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
