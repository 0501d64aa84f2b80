"""What things cost here: the environment they were timed in, the records, and the table that keeps them.

- `environment`: everything that can change a time or a number, as one fingerprint.
- `measurement`: one candidate timed once; a plain value that can be stored, shown and refused.
- `table`: the records and plans of all processes of this user, in one SQLite file.
- `sqlite`: that file.
- `contents`: what is in it, counted by environment.
- `contained`: what may crash is run in a process of its own first, the `helper`.
- `marker`: what a process was at when it went.
- `lock`: one process of a machine times at a time.
"""
