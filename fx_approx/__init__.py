"""fx_approx: train with fewer operations, by sampled matrix products and convolutions, as a pass over torch.fx.

approx = fx_approx.transform(model, policy)   # same parameters, same state_dict, exact in eval()
approx = torch.compile(approx)
print(fx_approx.report(approx))               # what each layer saves, and why the others were left exact
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a source checkout passes/ and policies/ stand beside this folder; an installed package has them inside.
if not (Path(__file__).parent / "passes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from fx_approx.core.version import VERSION

if TYPE_CHECKING:
    from fx_approx import analysis as analysis
    from fx_approx import data as data
    from fx_approx import distributed as distributed
    from fx_approx import errors as errors
    from fx_approx import policies as policies
    from fx_approx import recipes as recipes
    from fx_approx import schedules as schedules
    from fx_approx import subnetworks as subnetworks
    from fx_approx.compiler.transform import explain, report, restore, transform
    from fx_approx.core.plan import Plan
    from fx_approx.dynamo.backend import backend
    from fx_approx.dynamo.named import set_default_policy
    from fx_approx.runtime.controls import (
        load_sampler_state_dict,
        recalibrate_batchnorm,
        reuse_selection,
        sampler_state_dict,
        set_sampling,
    )
    from fx_approx.sampling.spec import SamplerConfig

__version__ = VERSION

__all__ = [
    "Plan",
    "SamplerConfig",
    "backend",
    "explain",
    "load_sampler_state_dict",
    "recalibrate_batchnorm",
    "report",
    "restore",
    "reuse_selection",
    "sampler_state_dict",
    "set_default_policy",
    "set_sampling",
    "transform",
]

_ROOMS = ("analysis", "data", "distributed", "errors", "policies", "recipes", "schedules", "subnetworks")

_PLACES = {
    **dict.fromkeys(("explain", "report", "restore", "transform"), "compiler.transform"),
    "Plan": "core.plan",
    "SamplerConfig": "sampling.spec",
    "backend": "dynamo.backend",
    "set_default_policy": "dynamo.named",
}


def _import(name: str) -> Any:
    """Imports what is asked for at the first time: all of it needs torch, which takes seconds, and help does not."""
    if name in __all__:
        value = getattr(importlib.import_module(f"fx_approx.{_PLACES.get(name, 'runtime.controls')}"), name)
        globals()[name] = value
        return value
    try:
        if not name.startswith("_"):
            return importlib.import_module(f"fx_approx.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"fx_approx.{name}":
            raise
    raise AttributeError(f"module 'fx_approx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


if not TYPE_CHECKING:  # type checkers know the names from above
    __getattr__ = _import
