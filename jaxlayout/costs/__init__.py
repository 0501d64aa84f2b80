"""What things cost here: the environment they were timed in, the records, and the table that keeps them.

- `environment`: everything that can change a time or a number, as one fingerprint.
- `measurement`: one candidate timed once; a plain value that can be stored, shown and refused.
- `table`: the records and plans of all processes of this user, in one SQLite file.
- `sqlite`: that file.
- `lock`: one process of a machine times at a time.
"""

from jaxlayout.costs.environment import Environment, current_environment
from jaxlayout.costs.lock import timing_lock
from jaxlayout.costs.measurement import Measurement
from jaxlayout.costs.sqlite import SCHEMA_VERSION
from jaxlayout.costs.table import CostTable, TableWarning, default_path

__all__ = [
    "SCHEMA_VERSION",
    "CostTable",
    "Environment",
    "Measurement",
    "TableWarning",
    "current_environment",
    "default_path",
    "timing_lock",
]
