"""JAX's settings, all that there are. Each has no effect on us or is in the key of what it changes: what we trace is
the same under it, we do under it what `jax.jit` does, tuning has a value of its own, or the key is another one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, normal, shape
from jax import lax
from made_up import made_up

from jaxlayout import auto_layout
from jaxlayout.convs.lowering import _parts, evaluate, lowerings
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.program import equations, program_key
from jaxlayout.measure.environment import CONFIG, LOWERED, current_environment
from jaxlayout.rewrite.fold import fold
from jaxlayout.runtime import settings
from jaxlayout.runtime._compat import surroundings, unspecified_sharding
from jaxlayout.runtime.settings import thread_local, under
from jaxlayout.runtime.threads import Workers
from jaxlayout.tuning import pipeline
from jaxlayout.tuning.options import Options
from jaxlayout.tuning.request import TuningRequest

STRICT = {
    "jax_allow_f16_reductions": False,
    "jax_check_tracer_leaks": True,
    "jax_default_matmul_precision": "highest",
    "jax_enable_checks": True,
    "jax_enable_x64": True,
    "jax_explicit_x64_dtypes": "error",
    "jax_legacy_prng_key": "error",
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_transfer_guard": "disallow",
    "jax_transfer_guard_device_to_device": "disallow",
    "jax_transfer_guard_device_to_host": "disallow",
    "jax_transfer_guard_host_to_device": "disallow",
}
"""What raises where code is careless."""

CHECKED = {
    "jax_array_garbage_collection_guard": "log",
    "jax_check_static_indices": True,
    "jax_debug_infs": True,
    "jax_debug_key_reuse": True,
    "jax_debug_nans": True,
    "jax_mutable_array_checks": False,
    "jax_raise_on_ppermute_sort_diff": False,
    "jax_thread_guard": True,
}
"""What looks at results and at how arrays are used."""

NOTED = {
    "jax_error_checking_behavior_divide": "raise",
    "jax_error_checking_behavior_nan": "raise",
    "jax_error_checking_behavior_oob": "raise",
}
"""What makes `jax.numpy` write errors to a reference: in the user's program, where that is meant, and not in ours."""

RANDOM = {
    "jax_default_prng_impl": "rbg",
    "jax_enable_custom_prng": True,
    "jax_high_dynamic_range_gumbel": True,
    "jax_random_seed_offset": 7,
    "jax_softmax_custom_jvp": True,
    "jax_threefry_partitionable": False,
}
"""What the user's own code is traced to, where that draws random numbers."""

TRACED = {
    "check_vma": True,
    "jax_accurate_erf_inv": True,
    "jax_auto_pcast": False,
    "jax_default_device": jax.local_devices()[-1],
    "jax_disable_bwd_checks": True,
    "jax_disable_vmap_shmap_error": True,
    "jax_disallow_mesh_context_manager": True,
    "jax_remat_barrier_no_cotangents": True,
    "jax_remove_size_one_mesh_axis_from_type": True,
    "jax_use_direct_linearize": False,
}
"""What else it is traced to."""

INERT = {
    "jax2tf_associative_scan_reductions": True,
    "jax2tf_default_native_serialization": False,
    "jax_captured_constants_report_frames": 1,
    "jax_captured_constants_warn_bytes": 10**9,
    "jax_compilation_cache_check_contents": True,
    "jax_compilation_cache_expect_pgle": True,
    "jax_compilation_cache_include_metadata_in_key": True,
    "jax_compilation_cache_max_size": 10**6,
    "jax_debug_leaked_clients_on_clear_backends": True,
    "jax_debug_log_modules": "nothing",
    "jax_distributed_debug": True,
    "jax_dump_ir_modes": "jaxpr",
    "jax_enable_compilation_cache": False,
    "jax_explain_cache_misses": True,
    "jax_export_calling_convention_version": 10,
    "jax_export_deserialize_expired_versions": True,
    "jax_export_ignore_forward_compatibility": True,
    "jax_hlo_source_file_canonicalization_regex": "nothing",
    "jax_include_debug_info_in_dumps": False,
    "jax_include_full_tracebacks_in_locations": False,
    "jax_log_checkpoint_residuals": True,
    "jax_log_compiles": True,
    "jax_logging_level": "WARNING",
    "jax_persistent_cache_enable_xla_caches": "none",
    "jax_persistent_cache_min_compile_time_secs": 2.0,
    "jax_persistent_cache_min_entry_size_bytes": 1,
    "jax_pgle_aggregation_percentile": 80,
    "jax_pprint_use_color": False,
    "jax_raise_persistent_cache_errors": True,
    "jax_remove_custom_partitioning_ptr_from_cache_key": True,
    "jax_send_traceback_to_runtime": "on",
    "jax_serialization_version": 0,
    "jax_share_binary_between_hosts": False,
    "jax_share_binary_between_hosts_timeout_ms": 1000,
    "jax_source_url_schema": "nothing",
    "jax_traceback_filtering": "off",
    "jax_traceback_in_locations_limit": 3,
    "jax_tracer_error_num_traceback_frames": 2,
    "jax_use_cpp_shard_args": True,
}
"""Logs, caches of compiled programs, exports, source lines: no program is another one for them."""

OF_THE_PROCESS = {
    "jax_backend_target",
    "jax_check_proxy_envs",
    "jax_compilation_cache_dir",
    "jax_compiler_detailed_logging_min_ops",
    "jax_cpu_collectives_implementation",
    "jax_cpu_get_global_topology_timeout_minutes",
    "jax_cpu_get_local_topology_timeout_minutes",
    "jax_cross_host_transfer_socket_address",
    "jax_cross_host_transfer_timeout_seconds",
    "jax_cross_host_transfer_transfer_size",
    "jax_cross_host_transport_addresses",
    "jax_cuda_visible_devices",
    "jax_distributed_verify_secure_credentials",
    "jax_dump_ir_to",
    "jax_enable_preemption_service",
    "jax_enable_recoverability",
    "jax_force_dcn_cross_host_transfers",
    "jax_mock_gpu_topology",
    "jax_mtls_ca_file",
    "jax_mtls_cert_file",
    "jax_mtls_key_file",
    "jax_mtls_peer_uri_prefix",
    "jax_oneapi_visible_devices",
    "jax_platform_name",
    "jax_platforms",
    "jax_rocm_visible_devices",
    "jax_sort_devices_by_process_index",
    "jax_xla_backend",
    "mock_num_gpu_processes",
}
"""Read when backends start, processes meet or files are opened: which devices there are, not what is compiled for them
(that is told by the environment's platform, device and CPU)."""

OTHERS_PROGRAMS = {
    "jax_custom_jvp3",
    "jax_custom_vjp3",
    "jax_mosaic_allow_hlo",
    "jax_mosaic_unzip_debug_locations",
    "jax_pallas_auto_assign_collective_ids",
    "jax_pallas_auto_assign_collective_ids_limit",
    "jax_pallas_verbose_errors",
    "jax_refs_to_pins",
    "jax_remat3",
    "jax_scan3",
}
"""Of kernels in Pallas, which we have none of and which are parameters of their equation; and unfinished parts of JAX,
under which primitives have other names: those are barriers, whose key is their equation."""

DISABLED = {"eager_constant_folding", "jax_disable_jit", "jax_no_execution", "jax_no_tracing"}
"""What stops JAX itself, or leaves a function to it as it is."""

SETTINGS = {
    *STRICT,
    *CHECKED,
    *NOTED,
    *RANDOM,
    *TRACED,
    *INERT,
    *OF_THE_PROCESS,
    *OTHERS_PROGRAMS,
    *DISABLED,
    *CONFIG,
    *LOWERED,
}


def test_every_setting_of_jax_is_listed():
    """A new version of JAX has new ones: look what reads them, and give each its place above, or in `environment`."""
    assert sorted(set(jax.config.values) - SETTINGS) == []


def test_what_is_ours_is_listed():
    assert set(settings.TRACED) | set(settings.TUNING) <= set(jax.config.values)


@contextmanager
def changed(values: dict[str, Any], everywhere: bool = False) -> Iterator[None]:
    """Under those settings that this JAX has, of this thread where that can be."""
    before = {name: value for name, value in jax.config.values.items() if name in values}
    local = {name: values[name] for name in before if name in thread_local() and not everywhere}
    with ExitStack() as stack:
        for name in before.keys() - local.keys():
            jax.config.update(name, values[name])
            stack.callback(jax.config.update, name, before[name])
        stack.enter_context(under(local))
        yield


# What we trace ourselves


def convolved(lhs: Any, rhs: Any, **more: Any) -> tuple[Any, Any, ConvSignature]:
    """Operands of a convolution, channels last, and its signature."""
    numbers = {2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}[lhs.ndim - 2]
    given = {"window_strides": (1,) * (lhs.ndim - 2), "padding": "SAME", "dimension_numbers": numbers}
    (eqn,) = jax.make_jaxpr(lambda x, k: lax.conv_general_dilated(x, k, **(given | more)))(lhs, rhs).eqns
    return lhs, rhs, ConvSignature.of(lhs, rhs, eqn.params)


half = partial(shape, dtype="bfloat16")
CONVOLUTIONS = {
    "pointwise": convolved(shape(2, 8, 8, 3), shape(1, 1, 3, 4)),
    "plain": convolved(shape(2, 8, 8, 8), shape(3, 3, 8, 8)),
    "strided": convolved(shape(2, 8, 8, 3), shape(4, 4, 3, 4), window_strides=(2, 2)),
    "transposed": convolved(half(2, 5, 5, 3), half(4, 4, 3, 4), lhs_dilation=(2, 2), padding=((2, 2), (2, 2))),
    "volume": convolved(shape(1, 4, 5, 6, 3), shape(3, 3, 3, 3, 4)),
    "large": convolved(shape(2, 31, 31, 4), shape(31, 31, 1, 4), feature_group_count=4),
    "depthwise": convolved(half(2, 6, 5, 4), half(3, 3, 1, 8), feature_group_count=4),
    "grouped": convolved(shape(2, 6, 5, 16), shape(3, 3, 4, 16), feature_group_count=4),
    "gradient": convolved(shape(8, 6, 5, 2), shape(6, 5, 2, 8), batch_group_count=4, padding=((1, 1), (1, 1))),
}


def lowered() -> dict[str, str]:
    """What every lowering traces to."""
    found = {}
    for kind, (lhs, rhs, conv) in CONVOLUTIONS.items():
        for lowering in lowerings().values():
            for dims in lowering.dimension_numbers(conv):
                name = lowering.names(conv, dims)[-1]
                arrays = (
                    shape(*conv.lhs_shape(dims.lhs), dtype=lhs.dtype),
                    shape(*conv.rhs_shape(dims.rhs), dtype=rhs.dtype),
                )
                found[f"{kind} {name} {dims}"] = str(jax.make_jaxpr(partial(evaluate, name, conv, dims))(*arrays))
    return found


lowered_plainly = cache(lowered)
every = pytest.mark.parametrize("values", [STRICT | NOTED, CHECKED | RANDOM | TRACED], ids=["strict", "others"])


@every
def test_lowerings_are_traced_alike(values):
    plainly = lowered_plainly()
    _parts.cache_clear()
    with changed(values):
        found = lowered()
    elsewhere = {
        "materialised",
        "cropped",
    }  # put in by the interpreter; for padding that crosses
    assert {way.split()[1].partition("/")[0] for way in found} == lowerings().keys() - elsewhere
    assert found == plainly


@every
def test_what_is_folded_is_traced_alike(values):
    """Half precision, normalised in single: a scalar and a vector, a division, a shift."""

    def f(k, mean, var, gamma, beta, x):
        y = lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return ((y.astype(jnp.float32) - mean) / var * gamma + beta).astype(y.dtype)

    vector = shape(1, 1, 1, 4)
    args = half(3, 3, 2, 4), vector, vector, shape(), vector, half(2, 6, 5, 2)
    program = jax.make_jaxpr(f)(*args)

    def made() -> Any:
        return fold(program, [True] * 5 + [False], args)

    plainly = made()
    assert plainly is not program
    with changed(values):
        assert str(made()) == str(plainly)


@pytest.mark.parametrize("tuned", [lambda f: jax.grad(auto_layout(f)), lambda f: auto_layout(jax.grad(f))])
def test_traced_with_wide_numbers_and_lowered_without(ours, tuned, recwarn):
    def f(k, x):
        return jnp.sum(conv(x, k) ** 2)

    with jax.enable_x64(True):
        k, x = (jnp.asarray(np.asarray(a, np.float64)) for a in (K, X))
        expected, traced = jax.jit(jax.grad(f))(k, x), jax.jit(tuned(f)).trace(k, x)
    found = traced.lower().compile()(k, x)
    close(expected, found)
    assert [w for w in recwarn if "float64" in str(w.message)] == []


# As jit does


@pytest.fixture
def ours(costs, monkeypatch):
    """As `costs`, but lowerings of our own win."""

    ns = lambda name, i: (1e6 if name.startswith("xla@") else 1e3) + i  # noqa: E731
    monkeypatch.setattr(pipeline, "measure", made_up(ns))


K, X = normal(0, 3, 1, 2), normal(1, 2, 5, 2)


def conv(x: Any, k: Any) -> Any:
    return lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=2)


def loss(k: Any, x: Any, key: Any) -> Any:
    """Depthwise, with dropout."""
    y = conv(x, k)
    y = jnp.where(jax.random.bernoulli(key, 0.7, y.shape), y, jnp.zeros_like(y))
    return jnp.sum(jax.nn.softmax(y) ** 2)


def fresh(f: Any, *args: Any) -> Any:
    """What a function gives for arguments and a key that nobody has used."""
    with jax.transfer_guard("allow"):
        key = jax.random.key(0)
    out = f(*args, key)
    with jax.transfer_guard("allow"):
        return jax.tree.map(np.asarray, out)


SETS = {"strict": STRICT, "checked": CHECKED, "noted": NOTED, "others": RANDOM | TRACED | INERT}


@pytest.mark.parametrize("values", SETS.values(), ids=SETS)
def test_under_settings_it_does_what_jit_does(ours, capfd, values):
    step = jax.value_and_grad(loss)
    planned, frozen = auto_layout(step), auto_layout(loss).freeze(K)
    before = fresh(frozen, X)
    with changed(values):
        expected = fresh(jax.jit(step), K, X)
        close(expected, fresh(planned, K, X))
        close(expected, fresh(jax.jit(jax.value_and_grad(auto_layout(loss))), K, X))
        close(expected[0], fresh(frozen, X))
        with jax.transfer_guard("allow"):
            outcome = planned.outcome(K, X, jax.random.key(0))
        gc.collect()
    close(before, fresh(frozen, X))
    assert outcome.kept and {mode.candidate.lowering for mode in outcome.plan.choices.values()} == {"shifted", "rows"}
    assert "garbage" not in capfd.readouterr().err  # an array in a cycle, which is said where arrays are guarded


def test_where_jax_is_stopped(ours):
    tuned, jitted, one = auto_layout(conv), jax.jit(conv), X[:1]
    expected, found = jitted(X, K), tuned(X, K)
    close(expected, found)
    with jax.no_tracing(True):
        close(expected, tuned(X, K))
        with pytest.raises(RuntimeError, match="re-tracing function conv"):
            tuned(one, K)
    unspecified_sharding.cache_clear()
    with jax.disable_jit(True):
        close(expected, tuned.freeze(X)(K))
    with jax.no_execution(True):
        for f in jitted, tuned, auto_layout(conv):
            with pytest.raises(RuntimeError, match="no_execution"):
                f(X, K)


def test_where_jax_computes_constants_at_once(ours):
    """Also while it lowers. Under two settings more jax 0.10 then fails, or hangs in the verification of what it has
    made, over `lax.igamma` too."""

    def convolutions(f: Any) -> set[str]:
        return {str(eqn.primitive) for eqn in equations(f.trace(X, K).jaxpr) if "conv" in str(eqn.primitive)}

    tuned = auto_layout(conv)
    with jax.ensure_compile_time_eval():
        assert convolutions(tuned) == {"conv_general_dilated"}
        close(conv(X, K), tuned(X, K))
        close(conv(X, K), auto_layout(conv).freeze(X)(K))
    assert convolutions(tuned) == {"tuned_conv"}
    keys = ("jax_compilation_cache_include_metadata_in_key", "jax_remove_custom_partitioning_ptr_from_cache_key")
    with changed({"eager_constant_folding": True} | {name: INERT[name] for name in keys}):
        close(conv(X, K), auto_layout(conv)(X, K))


# In the key


def other(value: Any) -> Any:
    return f"not {value}"


def with_values(monkeypatch: Any, **values: Any) -> None:
    """As if JAX's options had these values: some cannot be changed any more."""
    every = jax.config.values | values
    monkeypatch.setattr(type(jax.config), "values", property(lambda config: every))


@pytest.mark.parametrize("name", sorted({*CONFIG} & jax.config.values.keys()))
def test_measurements_are_kept_apart(name, monkeypatch):
    before = current_environment().fingerprint
    with_values(monkeypatch, **{name: other(jax.config.values[name])})
    assert current_environment().fingerprint != before


@pytest.mark.parametrize("name", sorted({*CONFIG, *LOWERED} & jax.config.values.keys()))
def test_plans_are_kept_apart(name, monkeypatch):
    program = jax.make_jaxpr(conv)(X, K)

    def place() -> Any:
        asked = TuningRequest(jaxpr=program, original=program, options=Options())
        return pipeline.Pipeline(asked).plans.place

    before = place()
    with_values(monkeypatch, **{name: other(jax.config.values[name])})
    assert place() != before


def test_equations_lowered_otherwise_are_another_program():
    def f(key):
        return jax.random.bits(key, (3,))

    key = jax.random.key(0)
    keys = [program_key(jax.make_jaxpr(f)(key))]
    with jax.threefry_partitionable(False):
        keys.append(program_key(jax.make_jaxpr(f)(key)))
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        keys.append(program_key(jax.make_jaxpr(f)(key)))
    assert len({key.function for key in keys}) == len({key.skeleton for key in keys}) == 3
    assert program_key(jax.make_jaxpr(f)(key)) == keys[0]


IN_JITS_KEY = STRICT | CHECKED | NOTED | RANDOM | TRACED
NOT_IN_JITS_KEY = {
    "jax_array_garbage_collection_guard",
    "jax_check_tracer_leaks",
    "jax_debug_infs",
    "jax_debug_nans",
    "jax_default_prng_impl",
    "jax_disable_bwd_checks",
    "jax_disable_vmap_shmap_error",
    "jax_disallow_mesh_context_manager",
    "jax_enable_checks",
    "jax_enable_custom_prng",
    "jax_legacy_prng_key",
    "jax_thread_guard",
    "jax_transfer_guard",
    "jax_transfer_guard_device_to_device",
    "jax_transfer_guard_device_to_host",
    "jax_transfer_guard_host_to_device",
}
"""JAX itself keeps what it traced where these change."""


@pytest.mark.parametrize("name", sorted(IN_JITS_KEY.keys() & jax.config.values.keys()))
def test_what_is_prepared_is_kept_apart_where_jit_traces_anew(name):
    before = surroundings()
    assert surroundings() is before
    with changed({name: IN_JITS_KEY[name]}):
        assert (surroundings() is before) == (name in NOT_IN_JITS_KEY)
    assert surroundings() is before


def test_frozen_goes_by_all_that_jit_goes_by(forced):
    """What was traced in one context is not run in another; in the same one it is not traced again."""
    context, traced = jax.make_user_context(0), []

    def f(k, x):
        traced.append(context.value)
        return conv(x, k) * context.value

    frozen = auto_layout(f).freeze(K)
    for value in (1, 2, 1, 2):
        with context(value):
            close(conv(X, K) * value, frozen(X))
    assert traced == [1, 2]
    jax.clear_caches()
    gc.collect()
    assert list(frozen._prepared.values()) == []


# In other threads


@pytest.mark.parametrize("everywhere", [False, True])
def test_workers_have_the_settings_of_their_maker(everywhere):
    values = STRICT | CHECKED | RANDOM | {"jax_log_compiles": True, "jax_auto_pcast": False}
    local = {name: values[name] for name in values if name in thread_local() and name != "jax_thread_guard"}

    def seen() -> dict[str, Any]:
        return {name: getattr(jax.config, name) for name in local}

    with changed(local, everywhere), Workers(1) as workers:
        mine, theirs = seen(), workers.submit(seen).result()
    ours = settings.TUNING | dict.fromkeys((n for n in local if n.startswith("jax_transfer_guard_")), "allow")
    assert theirs == mine | {name: ours[name] for name in local.keys() & ours.keys()}


def test_every_setting_of_a_thread_can_be_handed_on():
    with (
        under(settings.for_tuning()),
        under({name: getattr(jax.config, name) for name in RANDOM if name in thread_local()}),
    ):
        pass
    with under({"jax_setting_of_another_version": 1}):
        pass
