"""`auto_layout` for Flax. Needs the extra `flax`.

- `linen`, `nnx`: modules, classes and methods that are tuned when they are called.
- `common`: what both make of a module: a function of its variables.
"""
