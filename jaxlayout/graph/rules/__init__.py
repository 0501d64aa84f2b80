"""The table of rules, one per primitive family; importing this package fills it."""

from jaxlayout.graph.rules import calls, elementwise, reductions, shapes
from jaxlayout.graph.rules.base import (
    Labelling,
    Orders,
    RegionRule,
    Rule,
    follow,
    register_rule,
    registered_rule,
    rule_for,
)

__all__ = [
    "Labelling",
    "Orders",
    "RegionRule",
    "Rule",
    "calls",
    "elementwise",
    "follow",
    "reductions",
    "register_rule",
    "registered_rule",
    "rule_for",
    "shapes",
]
