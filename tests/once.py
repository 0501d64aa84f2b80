"""A mark for tests that take long, and of what hardly depends on the versions of Python and of JAX."""

from __future__ import annotations

import sys

import pytest

once = pytest.mark.skipif(sys.version_info[:2] != (3, 12), reason="on one Python only")
