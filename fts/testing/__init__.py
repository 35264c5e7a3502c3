"""The properties (laws) of transforms and steps as checks, for the tests of fts and for your own transforms.

    check_transform(transform)              every law of a transform, on generated parameters and gradients
    check_step(step, state, batches)        every law of a step, on given or generated batches
    check_sharded_transform(make_transform) a transform on sharded tensors, in several processes
    TRANSFORM_LAWS, STEP_LAWS               the laws by name; each is a function that can be called alone
    strategies                              Hypothesis strategies: params(), grads_like(params), trajectories()

A law that is broken raises `LawError` with its name, the transform's label, the parameter and both values.

>>> import fts, fts.testing
>>> sign = fts.Transform(lambda params: (), lambda grads, state, params: ({k: -g.sign() for k, g in grads.items()}, state, {}))
>>> fts.testing.check_transform(sign, laws=["same_inputs_same_outputs", "inputs_unchanged"])
"""

from fts.errors import MissingDependencyError as _MissingDependencyError
from fts.messages import install_hint as _install_hint

try:
    import hypothesis as _hypothesis  # noqa: F401  # imported first, so that its absence has one clear message
except ImportError as error:
    raise _MissingDependencyError(
        "fts.testing generates its examples with Hypothesis, which is not installed. Install it: "
        f"{_install_hint('dev')}, or pip install hypothesis."
    ) from error

from fts.testing import strategies
from fts.testing.chains import chain_is_associative
from fts.testing.comparison import LawError
from fts.testing.sharded_checks import check_sharded_transform
from fts.testing.step_checks import STEP_LAWS, check_step
from fts.testing.transform_checks import TRANSFORM_LAWS, check_transform

__all__ = [
    "STEP_LAWS",
    "TRANSFORM_LAWS",
    "LawError",
    "chain_is_associative",
    "check_sharded_transform",
    "check_step",
    "check_transform",
    "strategies",
]
