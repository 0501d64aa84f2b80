"""`explain`: what was chosen for a program and why, as one value that is shown as text, HTML, JSON and pictures.

- `value`: what there is to say, plain data.
- `words`, `sections`, `terminal`, `html`, `plots`: how that is shown.
- `explanation`: both in one.
- `gather`, `flow`: how it comes from a program, its outcome and the cost table.
"""

from jaxlayout.report.explanation import Explanation, Site
from jaxlayout.report.gather import explain
from jaxlayout.report.value import Barrier, Move, Step, Transpose, Tried

__all__ = ["Barrier", "Explanation", "Move", "Site", "Step", "Transpose", "Tried", "explain"]
