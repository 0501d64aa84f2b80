"""Programs that several processes run together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

from helpers import ROOT


def test_two_processes(tmp_path):
    """Two real ones, with two devices each (see the script)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    logs = [tmp_path / f"log-{i}" for i in range(2)]

    def start(i):
        with logs[i].open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "tests.two_processes", port, str(i), str(tmp_path)],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAXLAYOUT_VERDICT": "0"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    started = [start(i) for i in range(2)]
    end = time.monotonic() + 420
    while time.monotonic() < end and not any(p.poll() for p in started) and any(p.poll() is None for p in started):
        time.sleep(0.1)
    for process in started:  # where one has failed, the other waits for it
        process.kill()
    assert [process.wait() for process in started] == [0, 0], "\n\n".join(log.read_text() for log in logs)
