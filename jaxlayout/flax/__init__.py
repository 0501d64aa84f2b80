"""`auto_layout` for Flax: `jaxlayout.flax.linen` and `jaxlayout.flax.nnx`. Needs the extra `flax`."""
