"""What `import jaxlayout` offers, from where it is."""

from jaxlayout.api.decorator import AutoLayout, auto_layout, tune
from jaxlayout.api.frozen import Frozen
from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.functional import (
    conv1d_auto_layout,
    conv2d_auto_layout,
    conv3d_auto_layout,
    im2col_with_layout,
)
from jaxlayout.convs.lowering import Composite, Lowering, register_lowering
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.rules import Labelling, Orders, Rule, register_rule
from jaxlayout.graph.sequence import select_layout_for_sequence
from jaxlayout.layout import (
    ConvDimensionNumbers,
    ConvLayout,
    KernelLayout,
    LayoutPolicy,
    LayoutTensor,
    LazyLayoutTensor,
)
from jaxlayout.report import Explanation
from jaxlayout.runtime.malloc import keep_freed_memory
from jaxlayout.table.table import CostTable, TableWarning
from jaxlayout.tuning.options import Options
from jaxlayout.tuning.outcome import Outcome
from jaxlayout.tuning.pipeline import TableMiss

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
    "LazyLayoutTensor",
    "Lowering",
    "Options",
    "Orders",
    "Outcome",
    "Plan",
    "Rule",
    "TableMiss",
    "TableWarning",
    "auto_layout",
    "conv1d_auto_layout",
    "conv2d_auto_layout",
    "conv3d_auto_layout",
    "im2col_with_layout",
    "keep_freed_memory",
    "register_lowering",
    "register_rule",
    "select_layout_for_sequence",
    "tune",
]
