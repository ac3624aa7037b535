"""Arguments that belong together."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# The KL of each update is held at a target: steered within the update, shortened where it went too far, with a clip for
# runaway actions. One setting for all tasks of docs/results.md, and for the zoo's, whose targets follow their clip ranges
HELD: Mapping[str, Any] = MappingProxyType(
    {"target_kl": 0.03, "kl_rule": "predictive", "kl_ceiling": 1.5, "clip_range": "outliers"}
)
