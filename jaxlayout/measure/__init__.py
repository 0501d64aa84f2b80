"""What things cost here. It knows jobs (a convolution, a transpose, or whatever has
alternatives), and nothing of graphs and plans.

- `jobs`: what is measured, and what it is checked against: the `reference`.
- `trials`: the alternatives of jobs compiled (`compiled`), checked and timed against each other.
- `environment`: everything that can change a time or a number, as one fingerprint.
- `peaks`: how fast the machine can be at all.
- `turns`: one thread of one process of a machine times at a time.
- `contained`: what may crash is run in a process of its own first, the `helper`.
- `marker`: what a process was at when it went.
- `remote`: jobs for the workers of any executor.
"""
