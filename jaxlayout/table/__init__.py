"""The cost table: what was measured and planned, kept for all processes of this user. It needs no JAX.

- `measurement`: one candidate timed once; a plain value that can be stored, shown and refused.
- `table`: the records and plans, in one SQLite file.
- `sqlite`: that file. `records`: what is in it, or in an exported one, checked before it is taken.
- `contents`: what is in it, counted by environment.
"""
