"""What `jaxlayout doctor` looks at: functions that give findings. None of them changes anything."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from jaxlayout.cli.noise import Finding, Grade, noise

PREFIXES = ("JAXLAYOUT_", "JAX_", "XLA_", "OMP_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "NPROC", "PJRT_NPROC")
"""How the names of environment variables that matter begin."""


def look_around(seconds: float, table: str) -> Iterator[Finding]:
    """All findings; `seconds` of them measuring noise, none if 0. `table`: the cost table's file."""
    yield from versions()
    yield from variables(os.environ)
    yield memory()
    yield from table_file(Path(table))
    try:
        from jaxlayout.measure.environment import current_environment

        environment = current_environment().to_json()
    except RuntimeError as error:
        yield Finding("device", "problem", " ".join(str(error).split()), "JAX finds no device: see JAX_PLATFORMS")
        return
    yield from machine(environment)
    yield padding()
    yield threads(environment["cores"], os.environ)
    yield helper_process()
    if seconds > 0:
        yield noise(seconds)


def versions() -> Iterator[Finding]:
    """The versions of Python and of the packages that matter; and whether this jaxlib is known to go wrong."""
    import jaxlayout
    from jaxlayout.measure.environment import package_version
    from jaxlayout.runtime._compat import KNOWN_BAD

    known = {name: package_version(name) for name in ("jax", "jaxlib", "numpy")}
    words = ", ".join(f"{name} {version}" for name, version in known.items())
    yield Finding("versions", "ok", f"jaxlayout {jaxlayout.__version__}, Python {platform.python_version()}, {words}")
    if bad := KNOWN_BAD.get(known["jaxlib"] or ""):
        yield Finding(
            "jaxlib",
            "warning",
            f"{known['jaxlib']}: {bad}",
            "Another jaxlib is safer. What jaxlayout does: each candidate is checked against a float64 reference that "
            "shares no code with XLA, the whole function against the original, and an option that turns YNNPACK's "
            "fusions off is tried on each function. What it leaves as it is, XLA compiles as ever.",
        )


def variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The environment variables that change what is compiled, how it is timed, or jaxlayout's options."""
    from jaxlayout.tuning.options import Options

    variables = {name: value for name, value in sorted(environ.items()) if name.startswith(PREFIXES)}
    words = ", ".join(f"{name}={value}" for name, value in variables.items())
    yield Finding("variables", "ok", words or "none that matters is set")
    known = {f"JAXLAYOUT_{field.name.upper()}" for field in fields(Options)}
    if unknown := sorted(name for name in variables if name.startswith("JAXLAYOUT_") and name not in known):
        advice = f"The options are {', '.join(sorted(known))}."
        yield Finding("options", "warning", f"no option of jaxlayout: {', '.join(unknown)}", advice)
    try:
        Options.from_environment()
    except ValueError as error:
        yield Finding("options", "problem", str(error), "auto_layout raises this wherever it is used.")
    if flags := environ.get("XLA_FLAGS"):
        yield Finding("flags", "note", f"XLA_FLAGS={flags}", "What is measured under them holds under them only.")


def memory() -> Finding:
    """Whether the C library keeps the memory of arrays that are gone."""
    from jaxlayout.runtime.malloc import keeps_freed_memory

    kept = keeps_freed_memory()
    if kept is None:
        return Finding("memory", "ok", "what the C library does with freed memory is not known on this system")
    if kept:
        return Finding("memory", "ok", "freed memory is kept for the next arrays")
    advice = "In networks that can take a third of the time: jaxlayout.keep_freed_memory() at the start of a program."
    return Finding("memory", "note", "freed memory of large arrays goes back to the system, page by page", advice)


def table_file(path: Path) -> Iterator[Finding]:
    """The cost table's file, without opening it as ours: nothing is repaired, or set aside."""
    from jaxlayout.table.contents import holdings
    from jaxlayout.table.records import look
    from jaxlayout.table.sqlite import on_network

    if str(path) == ":memory:":
        yield Finding("table", "note", "in memory only", "Each process measures for itself.")
        return
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    for place in (path, path.parent) if path.exists() else (folder,):
        if not os.access(place, os.W_OK):
            advice = "What is measured is kept for one process only. JAXLAYOUT_TABLE names another file."
            yield Finding("table", "warning", f"{place} cannot be written", advice)
            break
    if on_network(path):
        advice = "It works, more slowly; machines of different kinds do not use each other's records."
        yield Finding("table", "note", f"{path} is on a network file system", advice)
    if aside := sorted(other.name for other in path.parent.glob(f"{path.name}.damaged-*") if other.suffix != ".lock"):
        advice = "What was valid in it was copied; `jaxlayout table merge` reads it once more, then it can go."
        yield Finding("table", "note", f"set aside as damaged: {', '.join(aside)}", advice)
    if not path.exists():
        yield Finding("table", "ok", f"{path}: not there yet, made when first needed")
        return
    if not path.is_file() or not os.access(path, os.R_OK):
        yield Finding("table", "problem", f"{path} cannot be read", "JAXLAYOUT_TABLE names another file.")
        return
    rows, refused = look(path)
    found = holdings(rows)
    measurements, plans = sum(held.measurements for held in found), sum(held.plans for held in found)
    counts = f"{path}: {measurements} measurements, {plans} plans, in {len(found)} environments"
    if not refused:
        yield Finding("table", "ok", counts)
    else:
        grade: Grade = "warning" if found else "problem"
        advice = "These are measured again; a damaged file is set aside, and what is valid copied, when next used."
        shown = "; ".join(refused[:3]) + ("; ..." if len(refused) > 3 else "")
        yield Finding("table", grade, f"{counts}; refused {len(refused)}: {shown}", advice)


def machine(environment: Mapping[str, Any]) -> Iterator[Finding]:
    """Device and processor."""
    import jax

    kinds = sorted({device.device_kind for device in jax.local_devices()})
    device = f"{environment['platform']}, {len(jax.local_devices())} of kind {', '.join(kinds)}"
    if environment["platform"] == "cpu":
        yield Finding("device", "ok", device)
    else:
        yield Finding("device", "note", device, "What has been tuned for speed so far is CPUs.")
    words = f"{environment['cpu']} ({platform.machine()})"
    if platform.machine().lower() in ("x86_64", "amd64"):
        yield Finding("processor", "ok", words)
    else:
        yield Finding("processor", "note", words, "What has been tuned for speed so far is x86.")
    here, usable, real = os.cpu_count() or 1, environment["cores"], physical_cores()
    cores = f"{usable} usable of {here}" + (f", {real} physical" if real else "")
    if usable < here:
        yield Finding("cores", "note", cores, "Affinity or a quota holds: what is measured is for so many cores.")
    else:
        yield Finding("cores", "ok", cores)


def padding() -> Finding:
    """Whether XLA computes a convolution rightly whose padding cuts off before an axis and adds after it, which some
    versions do not (`_compat.KNOWN_BAD`): found out by running one."""
    import jax
    import numpy as np

    from jaxlayout.convs.candidates import Candidate
    from jaxlayout.convs.signature import ConvSignature
    from jaxlayout.layout import ConvDimensionNumbers
    from jaxlayout.measure.jobs import conv_job
    from jaxlayout.measure.trials import measure

    conv = ConvSignature(
        batch=2,
        in_features=8,
        out_features=8,
        spatial=(9, 8),
        kernel=(3, 3),
        strides=(1, 1),
        padding=((-1, 1), (0, 0)),
        lhs_dilation=(1, 1),
        rhs_dilation=(1, 1),
        lhs_dtype=np.dtype(np.float32),
        rhs_dtype=np.dtype(np.float32),
    )
    job = conv_job(conv, [Candidate("xla", ConvDimensionNumbers.channels_last(2))])
    [(_, found)] = measure([job], device=jax.local_devices()[0])
    (seen,) = found.values()
    what = "a convolution that pads by -1 before and 1 after"
    if seen.status != "wrong":
        return Finding("padding", "ok", f"{what} is right")
    advice = (
        "Of those that you write, or differentiation does, explain says which are wrong; jaxlayout puts none in. "
        "Right everywhere: a slice in place of the negative padding."
    )
    return Finding("padding", "warning", f"{what} is wrong as XLA computes it, by {seen.error:.2g} of the rms", advice)


def threads(cores: int, environ: Mapping[str, str]) -> Finding:
    """What is told to XLA:CPU of its threads."""
    variables = {name: environ[name] for name in ("PJRT_NPROC", "NPROC") if environ.get(name)}
    flags = [flag for flag in environ.get("XLA_FLAGS", "").split() if "thread" in flag or "parallelism" in flag]
    words = ", ".join([*(f"{name}={value}" for name, value in variables.items()), *flags])
    if words:
        return Finding("threads", "note", f"{words} on {cores} cores", "What is measured holds with these only.")
    other = sorted(name for name in environ if name.startswith("OMP_"))
    advice = f"{', '.join(other)}: XLA's own threads do not heed that." if other else ""
    return Finding("threads", "note" if other else "ok", f"XLA:CPU uses all {cores} cores", advice)


def helper_process() -> Finding:
    """Whether what may crash can be run in a process of its own first."""
    from jaxlayout.measure.contained import NoHelper, start_seconds

    try:
        seconds = start_seconds()
    except NoHelper as error:
        words = f"what may crash cannot be run in a process of its own: {error}"
        return Finding("helper", "warning", words, "Lowerings that may crash are not offered.")
    words = f"what may crash is run in a process of its own first, which starts in {seconds:.1f} s"
    return Finding("helper", "ok", words)


def physical_cores() -> int | None:
    """Cores of this machine, without those that are there twice (hyper-threads); None where that is not known."""
    try:
        blocks = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")
    except OSError:
        return None
    found = set()
    for block in blocks:
        pairs = (line.partition(":") for line in block.splitlines())
        named = {name.strip(): value.strip() for name, _, value in pairs}
        if "core id" in named:
            found.add((named.get("physical id"), named["core id"]))
    return len(found) or None
