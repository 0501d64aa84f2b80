"""Every warning that can be given is in docs/messages.md, which says what to do about it."""

from __future__ import annotations

import ast
import re

import pytest
from helpers import ROOT

PAGE = (ROOT / "docs" / "messages.md").read_text()

GIVEN = ("logger.warning", "tell_once", "turns.tell", "self._warn")


def warned() -> list[str]:
    """What is given to the log's warnings, as far as it is text in the source."""
    found = []
    for file in sorted((ROOT / "jaxlayout").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in GIVEN:
                found += [text for text in (words(node.args[0]),) if text]
    return found


def words(node: ast.expr) -> str:
    """The longest text in a message that is filled in nowhere."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [str(part.value) for part in parts if isinstance(part, ast.Constant)]
    pieces = [piece.strip(" :;()") for text in texts for piece in re.split(r"%\.?\d*[sdr]", text)]
    return max(pieces, key=len, default="")


def test_some_are_found():
    assert len(warned()) > 15 and "tuning failed, the program stays as it is" in warned()


@pytest.mark.parametrize("text", warned())
def test_it_is_told_what_to_do_about_it(text):
    assert text in PAGE
