"""All scenarios of ranks; run as a script, one process each."""

from __future__ import annotations

import fsdp_ranks
import ranks
import recipe_ranks
import reduction_ranks
import subnetwork_ranks

SCENARIOS = {
    **reduction_ranks.SCENARIOS,
    **{f"sharded {name}": scenario for name, scenario in fsdp_ranks.SCENARIOS.items()},
    **{f"recipe {name}": scenario for name, scenario in recipe_ranks.SCENARIOS.items()},
    **{f"subnetwork {name}": scenario for name, scenario in subnetwork_ranks.SCENARIOS.items()},
}

if __name__ == "__main__":
    ranks.main(SCENARIOS)
