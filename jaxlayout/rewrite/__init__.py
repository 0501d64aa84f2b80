"""From a jaxpr and a plan to another program: scales folded, what holds still split off, equations bound anew."""
