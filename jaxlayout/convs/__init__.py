"""One convolution, many ways to compute it.

- `signature`: what a convolution computes, whatever its layouts.
- `lowering`: a way to compute one, as a class; `lowerings`: those that come with the package, one file each.
- `candidates`: lowerings in layouts, and which of them are worth timing.
- `primitive`: `tuned_conv`, which holds a choice in a jaxpr; `elsewhere`: that primitive in JAX's own tables.
- `views`, `materialise`: what several lowerings are made of.
- `functional`: the public convolutions of `LayoutTensor`s, which no stage uses.
"""

from jaxlayout.convs import lowerings as _lowerings  # noqa: F401  registers what comes with the package
