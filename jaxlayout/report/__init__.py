"""`explain`: what was chosen for a program and why, as one value that is shown as text, HTML, JSON and pictures.

- `value`: the value, plain data.
- `gather`, `flow`: how it comes from a program, its outcome and the cost table.
- `words`, `terminal`, `html`, `plots`: how it is shown.
"""

from jaxlayout.report.gather import explain
from jaxlayout.report.value import Barrier, Explanation, Move, Site, Step, Transpose, Tried

__all__ = ["Barrier", "Explanation", "Move", "Site", "Step", "Transpose", "Tried", "explain"]
