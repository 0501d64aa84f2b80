"""How axis orders travel through a program, and the cheapest choice of them.

- `rules`: which axis of an operand is which axis of a result, by primitive.
- `build`: the graph of a jaxpr, with the modes that each equation can work in.
- `shards`: which axes are divided among devices, so that the graph has the shapes of one device.
- `solve`: from a graph and costs to a plan; `minsum`: the minimisation behind it.
- `plan`: what was decided, as a value; `validate`: whether a plan fits a program.
- `program`: what is asked of whole jaxprs: all their equations, their hash, whether they have effects.
- `sequence`: the public `select_layout_for_sequence`, which no stage uses.
"""
