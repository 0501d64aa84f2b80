"""One program tuned, from its jaxpr to an `Outcome`.

- `line`: the stages one after the other.
- `task`, `options`: what is asked.
- `model`: where the questions of a graph's solver meet the table.
- `judge`: the program under a plan against the original.
- `forced`: the policy that measures nothing.
- `budget`: how long this process has measured.
- `first`: the first run of a program that has in it what may crash.
- `outcome`: what it came to.
"""
