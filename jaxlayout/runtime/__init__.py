"""What stands below all stages, and knows none of them.

- `_compat`: the one place for what differs between versions of JAX.
- `settings`, `threads`, `nesting`: in what threads, under which of JAX's settings, and within what, tuning runs.
- `timing`: how long a sample of a time lasts.
- `process`: a value that each process makes anew.
- `malloc`, `limits`: what `malloc` does with freed memory; what memory is left.
- `lock`: locks between processes.
- `plain_data`: what comes from elsewhere, refused where it is not what it should be.
- `progress`: what is told of long work.
"""
