"""jaxlayout: JAX convolutions in the layouts and forms that are fastest on this machine, by one decorator.

@auto_layout
def predict(params, images): ...
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlayout.public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """All that is public, and with it JAX, is imported when the first of it is asked for: `jaxlayout --help` needs
    neither."""
    public = importlib.import_module("jaxlayout.public")
    if name == "__all__" or name in getattr(public, "__all__", ()):  # none yet while it is being imported
        globals()[name] = value = getattr(public, name)
        return value
    raise AttributeError(f"module 'jaxlayout' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("jaxlayout.public").__all__})
