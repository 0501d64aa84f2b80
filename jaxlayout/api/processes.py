"""Programs that several processes run together (`jax.distributed`): process 0 decides, and the others do as it says, so
that all of them compile the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import Any

import jax
import numpy as np

from jaxlayout.measure.turns import NoTurn
from jaxlayout.runtime.threads import Workers
from jaxlayout.tuning.outcome import Outcome
from jaxlayout.tuning.pipeline import TableMiss

_KINDS = {"miss": TableMiss, "turn": NoTurn}
"""What is raised in all processes as what it is."""
HEARTBEAT = 10.0
"""Seconds after which process 0 tells the others that it is still at work: some runtimes give up on who is silent."""


def all_take_part(shardings: Sequence[Any]) -> bool:
    """Whether every process has a share in some array."""
    found = {device.process_index for sharding in shardings if sharding is not None for device in sharding.device_set}
    return len(found) == jax.process_count()


def agreed(decide: Callable[[], Outcome], stop: threading.Event) -> Outcome:
    """What `decide` gives in process 0; all processes have to call this. What it raises there is raised in all: as it
    is in process 0, as TableMiss, NoTurn or RuntimeError in the others. `stop`: set where process 0 is interrupted."""
    if jax.process_index() != 0:
        while not (message := _exchanged(b"")):
            pass
        return _read(json.loads(message))
    with Workers(1) as workers:
        deciding = workers.submit(decide)
        while wait([deciding], HEARTBEAT).not_done:
            _exchanged(b"")
    error = deciding.exception()
    if error is None and stop.is_set():
        error = KeyboardInterrupt("interrupted while it tuned")
    if error is None:
        said = {"outcome": deciding.result().to_json()}
    else:
        kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "other")
        said = {"error": repr(error), "kind": kind}
    _exchanged(json.dumps(said).encode())
    if error is not None:
        raise error
    return deciding.result()


def _exchanged(message: bytes) -> bytes:
    """The message of process 0, in all processes."""
    from jax.experimental import multihost_utils  # slow to import

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    if not size:
        return b""
    given = np.frombuffer(message, np.uint8) if message else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(given)).astype(np.uint8).tobytes()


def _read(said: dict[str, Any]) -> Outcome:
    if "outcome" in said:
        return Outcome.from_json(said["outcome"])
    raise _KINDS.get(said["kind"], RuntimeError)(f"process 0, which decides for all: {said['error']}")
