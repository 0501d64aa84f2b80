"""The docs site: it builds without a warning, and its reference has all that is public."""

from __future__ import annotations

import re

from helpers import ROOT, python
from once import once

from jaxlayout import public


def test_the_reference_has_all_that_is_public():
    pages = (ROOT / "website" / "reference").glob("*.md")
    named = re.findall(r"^::: jaxlayout\.(\w+)$", "".join(page.read_text() for page in pages), re.MULTILINE)
    assert sorted(named) == sorted(public.__all__)


def test_the_examples_are_on_their_page():
    page = (ROOT / "website" / "examples" / "README.md").read_text()
    assert all(f'"examples/{path.name}"' in page for path in (ROOT / "examples").glob("*.py"))


@once
def test_it_builds_without_a_warning(tmp_path):
    """Broken links and anchors are warnings, and so are names that the reference does not find."""
    command = "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml", "--site-dir", tmp_path
    python(*command, NO_MKDOCS_2_WARNING="1")
    assert 'id="jaxlayout.auto_layout"' in (tmp_path / "reference" / "tuning" / "index.html").read_text()
