"""One convolution, many ways: its signature, the candidates to compute it, the primitive that holds a choice."""

from jaxlayout.convs import lowerings as _lowerings  # noqa: F401  registers what comes with the package
