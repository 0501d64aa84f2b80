"""The table of rules, one file for each family of primitives; importing this package fills it.

- `base`: what a rule is, how orders follow from labels, and the table.
- `elementwise`, `shapes`, `reductions`: primitives that compute. `calls`, `loops`, `sharding`: those that run jaxprs.
"""

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
