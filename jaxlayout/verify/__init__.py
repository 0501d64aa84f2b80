"""Two compiled functions held against each other: it knows nothing of how they were made.

- `accuracy`: how accurate each result of a program can be.
- `accept`: numbers, memory and time compared, as a `Verdict`.
- `race`: which of two is faster, by a sequential test.
"""
