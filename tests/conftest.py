"""Shapes in annotations are checked at run time in all tests: jaxtyping with beartype."""

import jaxtyping
from hypothesis import settings

CORE = (
    "schedule",
    "weights",
    "density",
    "proposals",
    "adaptive",
    "strata",
    "sampler",
    "estimator",
    "gradient",
    "noise",
)
VARIANCE = ("values", "moments", "stopping", "measure", "reference", "cost", "vjp", "paired", "memory")
jaxtyping.install_import_hook(
    [f"carv.{name}" for name in CORE] + [f"carv.variance.{name}" for name in VARIANCE], "typecheck.checked"
)

# No deadlines: speed is measured in benchmarks/, on a machine that does nothing else.
settings.register_profile("carv", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("carv")
