"""From a jaxpr and a plan to another program.

- `retrace`: the equations bound again under a plan, with transposes where orders differ.
- `invariant`: which values depend on frozen arguments alone.
- `fold`: a scale and shift after a convolution, folded into its kernel; before planning.
- `split`: the part that is computed once, and the part that each call runs; after planning.
"""
