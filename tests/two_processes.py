"""Run by test_processes, twice at a time: two processes that compute together, each with a table of its own."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import signal
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlayout import auto_layout, tune
from jaxlayout.api import processes
from jaxlayout.tuning import pipeline
from tests.made_up import made_up
from tests.on_devices import PARAMS, X, Y, close, net, step

ME = -1
PLAIN = jax.jit(step)


def costs(written_ns, measured=None):
    """Made-up costs: of what is written, and 1 us for anything else by XLA."""
    return made_up(lambda name, _: 1e3 if name.startswith("xla") else 1e5, written_ns, measured)


def failing(jobs, **_):
    raise ArithmeticError("no measuring here")


def slow(jobs, **keywords):
    time.sleep(1.0)
    yield from costs(1e9)(jobs, **keywords)


def interrupted(jobs, **keywords):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    yield from costs(1e9)(jobs, **keywords)


def measuring(first, second):
    """What each process has for its measuring from now on."""
    pipeline.measure = (first, second)[ME]


def fresh(name):
    """A table that no process has had yet; each has its own."""
    return f"{FOLDER}/{name}-{ME}.sqlite"


def spread(array, sharding):
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def hashes(text):
    """Of the texts that all processes have."""
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return [one.tobytes() for one in np.asarray(multihost_utils.process_allgather(mine))]


def same_everywhere(text):
    assert len({*hashes(text)}) == 1


def raised(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind} was not raised")


def trained(tuned, args):
    """Three steps, equal to those of one process."""
    params, expected = args[0], PARAMS
    for _ in range(3):
        params, loss = tuned(params, *args[1:])
        expected, wanted = PLAIN(expected, X, Y)
        close(loss, wanted)
    close(params, expected)
    same_everywhere(tuned.lower(*args).as_text())
    same_everywhere(repr(np.asarray(loss)))


def main():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, all_ = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    args = jax.tree.map(lambda p: spread(p, all_), PARAMS), spread(X, rows), spread(Y, rows)
    told: Any = {"out_shardings": (all_, all_)}

    # One decides, though it takes a while, and the other cannot.
    measuring(slow, failing)
    tuned = auto_layout(step, table=fresh("one"), **told)
    trained(tuned, args)
    outcome = tuned.outcome(*args)
    assert outcome.kept and outcome.source == "stored" and "several processes" in outcome.verdict.reason, outcome
    assert tune(tuned, *args) == outcome
    assert tuned.plan(*args) == outcome.plan
    assert tuned.explain(*args).outcome == outcome
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), args)
    assert tuned.outcome(*shapes) == outcome

    # The pieces were measured.
    keys = []
    measuring(costs(1e9, keys), failing)
    auto_layout(net, table=fresh("pieces"))(*args[:2])
    found = {key[4:].split("x")[0] for key in keys if key.startswith("lhs=")}
    assert found == ({"4"} if ME == 0 else set()), keys

    # The other has a table that says the contrary, from programs that it ran alone; and what each has decided for its
    # own arrays of the same shapes does not matter.
    measuring(costs(1e9), costs(1.0))
    tuned = auto_layout(step, table=fresh("contrary"))
    here = jax.device_put((PARAMS, X, Y), jax.local_devices()[0])
    if ME == 1:
        local = auto_layout(step, table=fresh("contrary"))
        local(here[0], here[1][:4], here[2][:4])
    close(tuned(*here)[1], PLAIN(PARAMS, X, Y)[1])
    assert len({*hashes(str(tuned.plan(*here).to_json()["choices"]))}) == 2
    close(tuned(*args)[1], PLAIN(PARAMS, X, Y)[1])
    same_everywhere(tuned.lower(*args).as_text())
    assert tuned.outcome(*args).kept

    # What goes wrong in the first leaves the program as it is in both.
    measuring(failing, costs(1e9))
    tuned = auto_layout(step, table=fresh("failing"), **told)
    trained(tuned, args)
    assert "ArithmeticError" in tuned.outcome(*args).verdict.reason and not tuned.outcome(*args).kept

    # Or is raised in both.
    tuned = auto_layout(net, table=fresh("missing"), on_miss="error")
    assert "lacks" in raised(pipeline.TableMiss, lambda: tuned(*args[:2]))

    # An interrupt in the first ends it in both, and the next call goes on.
    measuring(interrupted, failing)
    tuned = auto_layout(net, table=fresh("interrupted"))
    raised(KeyboardInterrupt if ME == 0 else RuntimeError, lambda: tuned(*args[:2]))
    measuring(costs(1e9), failing)
    close(multihost_utils.process_allgather(tuned(*args[:2]), tiled=True), net(PARAMS, X))
    assert tuned.outcome(*args[:2]).kept

    # Where it cannot be seen whether the others take part, nothing is done.
    measuring(failing, failing)
    tuned = auto_layout(lambda *args: step(*args)[1], table=fresh("nested"))
    wanted = PLAIN(PARAMS, X, Y)[1]
    close(jax.jit(tuned, out_shardings=all_)(*args), wanted)
    if ME == 0:
        close(jax.jit(tuned)(*here), wanted)
        jax.grad(tuned)(*here)
    jax.block_until_ready(jax.grad(tuned)(*args))

    # Frozen weights, and a policy that measures nothing.
    measuring(costs(1e9), failing)
    frozen = auto_layout(net, table=fresh("frozen")).freeze(args[0])
    close(multihost_utils.process_allgather(frozen(args[1]), tiled=True), net(PARAMS, X))
    assert frozen.outcome(args[1]).kept
    measuring(failing, failing)
    tuned = auto_layout(step, policy="channels_last", **told)
    trained(tuned, args)
    assert tuned.outcome(*args).kept and jnp.isfinite(tuned(*args)[1])


if __name__ == "__main__":
    port, ME, FOLDER = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, ME)
    processes.HEARTBEAT = 0.3
    faulthandler.dump_traceback_later(400, exit=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
    jax.distributed.shutdown()
    print("both are done")
