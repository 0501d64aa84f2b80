"""The table of rules, one per primitive family; importing this package fills it."""

from jaxlayout.graph.rules import calls, elementwise, loops, reductions, shapes, sharding
from jaxlayout.graph.rules.base import (
    Body,
    Labelling,
    Orders,
    Port,
    RegionRule,
    Rule,
    bodies_of,
    follow,
    is_placed,
    register_rule,
    registered_rule,
    rule_for,
)

__all__ = [
    "Body",
    "Labelling",
    "Orders",
    "Port",
    "RegionRule",
    "Rule",
    "bodies_of",
    "calls",
    "elementwise",
    "follow",
    "is_placed",
    "loops",
    "reductions",
    "register_rule",
    "registered_rule",
    "rule_for",
    "shapes",
    "sharding",
]
