"""How much is tested: `make test` takes Hypothesis's profile "tests", `make fuzz` the profile "fuzz" and the tests so marked."""

import gc
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

COMMON = {
    "deadline": None,  # no time limits in tests; the first call of an operator is slow
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
settings.register_profile("tests", max_examples=20, derandomize=True, **COMMON)
settings.register_profile("fuzz", max_examples=300, **COMMON)
settings.load_profile("tests")

# a shell's background jobs ignore SIGINT, and what they start does, too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    """Long tests run under `make fuzz` only, and those of CUDA where it is."""
    skipped = {}
    if config.getoption("--hypothesis-profile") != "fuzz":
        skipped["fuzz"] = "long: run by make fuzz, or with --hypothesis-profile=fuzz"
    if not torch.cuda.is_available():
        skipped["cuda"] = "needs an NVIDIA GPU"
    for item in items:
        for marker, reason in skipped.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def cheap_garbage_collection():
    """Leave what is there before a module's tests (libraries, the collected tests) out of garbage collection.

    Trainers collect garbage at the end of each run: to visit all those objects each time was a quarter of the processor time.
    """
    gc.collect()
    gc.freeze()
