"""From a jaxpr and a plan to another program: scales folded, what is invariant split off, equations bound anew."""
