"""Every warning and every error that a user can meet is in docs/messages.md, which says what to do about it."""

from __future__ import annotations

import ast
import builtins
import functools
import re

import pytest
from helpers import ROOT

from jaxlayout import public

PAGE = (ROOT / "docs" / "messages.md").read_text().replace("`", "")

GIVEN = ("logger.warning", "tell_once", "turns.tell", "self._warn")

NAMES = {**vars(builtins), **{name: getattr(public, name) for name in public.__all__}}
RAISED = {name for name, kind in NAMES.items() if isinstance(kind, type) and issubclass(kind, BaseException)}
RAISED |= {"UsageError", "Failure", "argparse.ArgumentTypeError"}
"""What a user can catch, or reads at the command line. Other exceptions are among ourselves."""

CAUGHT = {
    "__init__.py": "Python's own words for a name that a module has not",
    "graph/minsum.py": "of a problem that is always made here",
    "measure/contained.py": "told as the interruption of tuning",
    "runtime/lock.py": "of the table's repair: told as a warning about its file",
    "runtime/plain_data.py": "why a record is refused, or a plan",
    "table/measurement.py": "why a record is refused",
    "tuning/outcome.py": "why a record is refused",
    "verify/accept.py": "why a record is refused",
}
"""Files whose errors do not reach a user by themselves, and what becomes of them."""


@functools.cache
def calls() -> list[tuple[str, str, ast.expr]]:
    """All of the package: the file, what is called, and the first argument."""
    package, found = ROOT / "jaxlayout", []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and node.args:
                found.append((file.relative_to(package).as_posix(), ast.unparse(node.func), node.args[0]))
    return found


def warned() -> list[str]:
    """What is given to the log's warnings, as far as it is text in the source."""
    texts = (words(message) for _, called, message in calls() if called in GIVEN)
    return [text for text in texts if text]


def raised() -> list[str]:
    """What is said in errors, wherever one is made: it may be raised elsewhere."""
    found = {
        words(message): None
        for file, called, message in calls()
        if file not in CAUGHT and (called in RAISED or called.startswith("_KINDS.get("))
    }
    return [text for text in found if text]


FILLED = " … "


def words(node: ast.expr) -> str:
    """The text of a message, with FILLED for what is filled in; "" where all of it is."""
    if isinstance(node, ast.Subscript):  # cut short
        node = node.value
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [str(part.value) if isinstance(part, ast.Constant) else FILLED for part in parts]
    text = re.sub(r"%\.?\d*[sdrg]|\n|`", FILLED, "".join(texts))
    return text if re.search(r"\w", text) else ""


def is_told(text: str) -> bool:
    """Whether a line of the page has the pieces of a message, in their order."""
    pieces = [re.escape(piece.strip(" :;,()'")) for piece in text.split(FILLED)]
    return re.search(".*".join(pieces), PAGE) is not None


def test_some_are_found():
    assert len(warned()) > 15 and "tuning failed, the program stays as it is" in warned()
    assert len(raised()) > 50 and "auto_layout:  …  is not a function" in raised()
    assert f"process 0, which decides for all: {FILLED}" in raised()


def test_what_is_not_told_is_found():
    assert is_told("no lowering named  …  is registered, only  … ") and not is_told("no lowering named  …  is here")


def test_what_is_left_out_is_there():
    assert all((ROOT / "jaxlayout" / file).is_file() for file in CAUGHT)


@pytest.mark.parametrize("said", [warned, raised])
def test_it_is_told_what_to_do_about_each(said):
    assert not [text for text in said() if not is_told(text)]
