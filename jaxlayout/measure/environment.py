"""`Environment`: everything that can change what a measurement says, and its fingerprint.

Importing this touches no device; `current_environment` does.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.extend.backend

from jaxlayout.runtime.limits import cores
from jaxlayout.runtime.malloc import allocator
from jaxlayout.runtime.threads import default_device
from jaxlayout.table.measurement import MEASURING
from jaxlayout.table.table import describe

Device = Any  # jax.Device, which type checkers cannot see through
Pairs = tuple[tuple[str, str], ...]
"""A mapping as sorted (name, value) pairs, so that it is hashable."""

CONFIG = (
    "jax_compiler_enable_remat_pass",
    "jax_cpu_enable_async_dispatch",
    "jax_disable_most_optimizations",
    "jax_enable_pgle",
    "jax_enable_x64",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_num_cpu_devices",
    "jax_optimization_level",
    "jax_pgle_profiling_runs",
    "jax_pjrt_client_create_options",
    "jax_use_shardy_partitioner",
    "jax_xla_profile_version",
)
"""JAX options that change what a measurement says. One that a JAX version lacks is left out."""

LOWERED = (
    "jax_accurate_erf_inv",
    "jax_bcoo_cusparse_lowering",
    "jax_embedded_constants_max_bytes",
    "jax_experimental_unsafe_xla_runtime_errors",
    "jax_pallas_enable_debug_checks",
    "jax_pallas_poison_buffers",
    "jax_pallas_use_mosaic_gpu",
    "jax_ragged_dot_use_gpu_pallas_triton_lowering",
    "jax_ragged_dot_use_ragged_dot_instruction",
    "jax_threefry_gpu_kernel_lowering",
    "jax_use_emit_pipeline_primitive",
    "jax_use_hlo_logistic_lowering",
    "jax_use_magma",
    "jax_use_rgv3",
    "jax_use_simplified_jaxpr_constants",
)
"""JAX's settings that change what equations are lowered to, and so what is seen of whole programs."""

VARIABLES = ("LIBTPU_INIT_ARGS", "NPROC", "NVIDIA_TF32_OVERRIDE", "PJRT_NPROC", "XLA_FLAGS")
"""Environment variables that do: compiler flags, TF32, and the size of XLA:CPU's thread pool."""
ALLOCATORS = ("GLIBC_TUNABLES", "MALLOC_", "MIMALLOC_", "TCMALLOC_")
"""How those begin that say what becomes of memory, which moves times by a third."""

PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
"""Packages that hold an accelerator's compiler or convolutions, looked at where the platform is not CPU."""

CPU_FIELDS = {
    *("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags"),  # x86
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),  # Arm
}
"""Lines of /proc/cpuinfo that say what the processor is, and not how it is doing at the moment."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where a measurement holds. Equal fingerprints: measurements may be shared."""

    measuring: int
    """`MEASURING`."""
    versions: Pairs
    """What else the key depends on: of plans lowerings and rules with their versions, options and context; of
    measurements the compiler options; of proofs the machine."""
    jax: str
    jaxlib: str
    xla: str
    platform: str
    """The platform as JAX names it: "cpu", "gpu", "tpu"."""
    platform_version: str
    plugins: Pairs
    device_kind: str
    cpu: str
    """Model of the host's processor, in words."""
    cpu_features: str
    """Hash of model, stepping, cache size and feature flags of all its cores."""
    cores: int
    """Cores this process may run on, or fewer where the control group's quota is lower."""
    allocator: str
    """What allocates memory, as `malloc.allocator` says."""
    variables: Pairs
    config: Pairs

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over every field: the key of the cost table."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values, to be shown."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: dict(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def current_environment(device: Device = None, versions: Mapping[str, object] | None = None) -> Environment:
    """The environment of computations on `device` (None: JAX's default device) as things stand now.

    `versions` names the lowerings and rules in use, with their versions. JAX options are read as the
    calling thread sees them, so call it inside `jax.enable_x64()` and the like, not in a worker thread. Cost tables
    are told what its fingerprint stands for.
    """
    device = default_device() if device is None else device
    model, features = processor()
    on_cpu = device.platform == "cpu"
    environment = Environment(
        measuring=MEASURING,
        versions=_pairs(versions or {}),
        jax=jax.__version__,
        jaxlib=package_version("jaxlib") or "unknown",
        xla=str(jax.extend.backend.backend_xla_version(device.platform)),
        platform=device.platform,
        platform_version=device.client.platform_version,
        plugins=() if on_cpu else _pairs({name: package_version(name) for name in PLUGINS}),
        device_kind=device.device_kind,
        cpu=model,
        cpu_features=features,
        cores=cores(),
        allocator=allocator(),
        variables=_pairs({name: _variable(name) for name in os.environ if _matters(name)}),
        config=_pairs(config_values(CONFIG)),
    )
    describe(environment.fingerprint, environment.to_json())
    return environment


def settings() -> dict[str, Any]:
    """JAX's options that change numbers or compiled code, as this thread sees them."""
    return {name: value for name, value in config_values(CONFIG).items() if value is not None}


def _pairs(mapping: Mapping[str, object]) -> Pairs:
    """Sorted pairs of strings; entries that are None or "" are left out."""
    return tuple((str(name), str(mapping[name])) for name in sorted(mapping) if mapping[name] not in (None, ""))


def config_values(names: Sequence[str]) -> dict[str, Any]:
    """JAX options as this thread sees them; None where this JAX lacks one."""
    values = jax.config.values
    return {name: values.get(name) for name in names}


def _matters(name: str) -> bool:
    return name in VARIABLES or name.startswith(ALLOCATORS)


def _variable(name: str) -> str | None:
    """An environment variable; compiler flags in a form in which equal settings are equal."""
    value = os.environ.get(name)
    if name != "XLA_FLAGS" or value is None:
        return value
    if value.strip() and not value.lstrip().startswith("-"):  # XLA reads flags from a file of that name
        try:
            value = pathlib.Path(value.strip()).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return value
    flags = {flag.partition("=")[0]: flag for flag in value.split()}  # of those given twice the last holds
    return " ".join(flags[name] for name in sorted(flags) if not name.startswith("--xla_dump_"))


@functools.cache
def package_version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def processor() -> tuple[str, str]:
    """(model in words, hash of all that is known of the cores, which may be of several kinds)."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    pairs = ((name.strip(), value) for name, _, value in (line.partition(":") for line in lines))
    known = sorted({(name, " ".join(sorted(value.split()))) for name, value in pairs if name in CPU_FIELDS})
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or "unknown"
    described = json.dumps([platform.machine(), model, known])
    return model, hashlib.sha256(described.encode()).hexdigest()[:16]
