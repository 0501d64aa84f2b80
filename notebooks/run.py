"""Execute the notebooks and store what they print: `make notebooks`.

    python -m notebooks.run [notebook ...] [--to FOLDER]

Each runs in a kernel of this Python, in an empty folder, with a cost table of its own that is empty too: all that a
notebook shows is measured while it runs. With NOTEBOOKS=small in the environment they run at small sizes, as in the
tests: in seconds, with times that say nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent
SECONDS = 600
"""The longest that a cell may take."""


class ThisPython(AsyncKernelManager):
    """A kernel of this Python, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """How to start it."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def execute(path: Path) -> nbformat.NotebookNode:
    """A notebook with its outputs. CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = os.environ | {
            "JAXLAYOUT_TABLE": os.path.join(folder, "table.sqlite"),
            "IPYKERNEL_CELL_NAME": path.name,  # what source lines name, instead of a temporary file for each cell
            "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]),
        }
        told = {"timeout": SECONDS, "record_timing": False, "coalesce_streams": True}
        client = NotebookClient(notebook, kernel_manager_class=ThisPython, **told)
        client.execute(cwd=folder, env=environment)
    return notebook


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 1 if a notebook fails, which is then left as it was."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--to", type=Path, default=None, help="a folder for the executed ones; default: in place")
    given = parser.parse_args(argv)
    failed = False
    for path in given.notebooks or sorted(HERE.glob("*.ipynb")):
        start = time.monotonic()
        try:
            executed = execute(path)
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            failed = True
            continue
        nbformat.write(executed, path if given.to is None else given.to / path.name)
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
