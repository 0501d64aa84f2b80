"""One program tuned, from its jaxpr to an `Outcome`.

- `pipeline`: the stages one after the other.
- `request`, `options`: what is asked.
- `model`: where the questions of a graph's solver meet the table; `work`: equations that are no convolutions, as jobs.
- `memory_search`: a plan whose program takes no more memory than it may.
- `verifier`: the program under a plan against the original.
- `stores`: tables, proofs and plans, where they are kept.
- `forced`: the policy that measures nothing.
- `budget`: how long this process has measured.
- `proofs`: whether a plan's forms that may crash have been seen to run; `first_run`: that of a program of such.
- `outcome`: what it came to.
"""
