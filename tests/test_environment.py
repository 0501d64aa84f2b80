"""The fingerprint that keys the cost table."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from typing import Any

import jax
import pytest
from helpers import python

from jaxlayout.measure.environment import current_environment
from jaxlayout.table.measurement import MEASURING


def run(script: str, **variables: str) -> str:
    return python("-c", script, **variables).stdout.strip()


# The environment


def test_the_fingerprint_is_the_same_in_every_process():
    here = current_environment(versions={"dot": 1, "im2col": 2})
    assert current_environment(versions={"im2col": 2, "dot": 1}) == here
    assert len(here.fingerprint) == 16 and int(here.fingerprint, 16) >= 0
    script = """
from jaxlayout.measure.environment import current_environment
print(current_environment(versions={"dot": 1, "im2col": 2}).fingerprint)
"""
    assert run(script, PYTHONHASHSEED="1") == here.fingerprint


def test_it_says_what_it_stands_on():
    shown = json.loads(json.dumps(current_environment(versions={"dot": 1}).to_json()))
    assert shown["jax"] == jax.__version__
    assert shown["platform"] == jax.local_devices()[0].platform
    assert shown["versions"] == {"dot": "1"}
    assert shown["cores"] >= 1
    assert shown["config"]["jax_enable_x64"] in ("True", "False")
    assert "jax_disable_most_optimizations" in shown["config"]  # an option that is no attribute of jax.config


def test_every_field_counts():
    here = current_environment()
    for field in dataclasses.fields(here):
        value = getattr(here, field.name)
        other = (("a", "b"),) if isinstance(value, tuple) else value + type(value)(1)
        assert dataclasses.replace(here, **{field.name: other}).fingerprint != here.fingerprint


def test_options_are_read_as_the_calling_thread_sees_them():
    here = current_environment().fingerprint
    with jax.enable_x64(not jax.config.jax_enable_x64):
        wide = current_environment().fingerprint
    assert here != wide
    assert current_environment().fingerprint == here


def test_compiler_flags_count_but_not_how_they_are_written(monkeypatch, tmp_path):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("NPROC", raising=False)
    plain = current_environment().fingerprint

    def with_flags(flags: str) -> str:
        monkeypatch.setenv("XLA_FLAGS", flags)
        return current_environment().fingerprint

    one = with_flags("--xla_a=1 --xla_b")
    assert one != plain
    assert with_flags("--xla_b   --xla_a=2 --xla_dump_to=/tmp/somewhere --xla_a=1") == one
    assert with_flags("--xla_b --xla_a=2") != one
    assert with_flags("--xla_b=false --xla_a=1") != one
    assert with_flags(" ") == plain
    (tmp_path / "flags").write_text("--xla_b\n--xla_a=1\n")
    assert with_flags(str(tmp_path / "flags")) == one
    assert with_flags(str(tmp_path / "absent")) != plain
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("NPROC", "1")
    assert current_environment().fingerprint != plain


def environment_under(*before: str, **variables: str) -> dict[str, Any]:
    """The environment of a process with these variables, after these lines."""
    here = "from jaxlayout.measure.environment import current_environment"
    return json.loads(
        run(
            "\n".join(("import json", here, *before, "print(json.dumps(current_environment().to_json()))")), **variables
        )
    )


KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
MALLOPT = "import ctypes; [ctypes.CDLL(None).mallopt(*told) for told in ((-4, 0), (-1, 2**31 - 1))]"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is about glibc")
def test_what_malloc_was_told_counts():
    """By variables, by our own call, and by somebody else's."""
    plain = environment_under()
    told = environment_under(**KEPT)
    ours = environment_under("import jaxlayout", "assert jaxlayout.keep_freed_memory()")
    theirs = environment_under(MALLOPT)
    assert told["variables"] == plain["variables"] | KEPT
    assert environment_under(GLIBC_TUNABLES="glibc.malloc.hugetlb=1") == plain | {
        "variables": plain["variables"] | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    }
    if "gives freed memory back" not in plain["allocator"]:
        pytest.skip("large arrays are not handed back here")
    for other in (told, ours, theirs):
        assert other["allocator"] == plain["allocator"].replace("gives freed memory back", "keeps freed memory")
    assert {name for name in plain if theirs[name] != plain[name]} == {"allocator"}


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs a compiler")
def test_whose_malloc_it_is_counts(tmp_path):
    """One that is loaded before the C library's, whichever way."""
    source, library = tmp_path / "malloc.c", tmp_path / "libmine.so"
    source.write_text("void *__libc_malloc(unsigned long); void *malloc(unsigned long n) { return __libc_malloc(n); }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    script = "from jaxlayout.runtime.malloc import allocator; print(allocator())"
    assert run(script).startswith("libc.so")
    assert run(script, LD_PRELOAD=str(library)) == "libmine.so"


def test_the_key_holds_how_times_are_taken_and_not_the_packages_version(monkeypatch):
    """Lowerings have versions of their own: what was measured outlives a release."""
    here = current_environment()
    assert not {"jaxlayout", "schema"} & here.to_json().keys()
    monkeypatch.setattr("jaxlayout.__version__", "99.0")
    assert current_environment() == here
    monkeypatch.setattr("jaxlayout.measure.environment.MEASURING", MEASURING + 1)
    assert current_environment().fingerprint != here.fingerprint


def test_the_default_device_is_jaxs(monkeypatch):
    device = jax.local_devices(backend="cpu")[-1]
    with jax.default_device(device):
        assert current_environment() == current_environment(device)
    assert current_environment(device).platform == "cpu"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_cores_are_those_that_the_process_may_use():
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert current_environment().cores == 1
    finally:
        os.sched_setaffinity(0, mine)


def test_importing_touches_no_device():
    script = """
import jax
from jaxlayout.measure import environment
jax.config.update("jax_platforms", "no_such_platform")  # has no effect once a backend is up
try:
    environment.current_environment()
except RuntimeError as error:
    assert "no_such_platform" in str(error)
    print("as it should be")
"""
    assert run(script) == "as it should be"
