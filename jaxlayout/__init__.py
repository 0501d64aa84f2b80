"""jaxlayout: JAX convolutions in the layouts and forms that are fastest on this machine, by one decorator.

@auto_layout
def predict(params, images): ...
"""

from jaxlayout.api import AutoLayout, auto_layout, tune
from jaxlayout.convs import lowerings as _lowerings  # noqa: F401  registers what comes with the package
from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import Composite, Lowering, register_lowering
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.costs.table import CostTable, TableWarning
from jaxlayout.frozen import Frozen
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.rules import Labelling, Orders, Rule, register_rule
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout, LayoutPolicy, LayoutTensor
from jaxlayout.line import TableMiss
from jaxlayout.memory import keep_freed_memory
from jaxlayout.options import Options
from jaxlayout.outcome import Outcome
from jaxlayout.report import Explanation

__all__ = [
    "AutoLayout",
    "Candidate",
    "Composite",
    "ConvDimensionNumbers",
    "ConvLayout",
    "ConvSignature",
    "CostTable",
    "Explanation",
    "Frozen",
    "KernelLayout",
    "Labelling",
    "LayoutPolicy",
    "LayoutTensor",
    "Lowering",
    "Options",
    "Orders",
    "Outcome",
    "Plan",
    "Rule",
    "TableMiss",
    "TableWarning",
    "auto_layout",
    "keep_freed_memory",
    "register_lowering",
    "register_rule",
    "tune",
]
__version__ = "0.1.0"
