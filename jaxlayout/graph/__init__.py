"""How axis orders travel through a program (rules), the graph of them, the solver, and its plan."""
