"""What a user holds.

- `decorator`: `auto_layout`, the whole line behind `jax.jit`.
- `keywords`: what `auto_layout` takes, for editors.
- `tuner`: one function, and how it is tuned.
- `frozen`: a function some of whose arguments are given once and for all.
- `wrapped`: functions as JAX sees them, and the keywords of a jit.
- `derived`: convolutions that JAX derives after the function they stand in was planned.
- `processes`: programs that several processes run together.
"""
