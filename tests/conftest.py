"""How much is tested: `make test` takes Hypothesis's profile "tests", `make fuzz` the profile "fuzz" and the tests so marked."""

import pytest
from hypothesis import HealthCheck, settings

COMMON = {
    "deadline": None,  # no time limits in tests; the first call of an operator is slow
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
settings.register_profile("tests", max_examples=20, derandomize=True, **COMMON)
settings.register_profile("fuzz", max_examples=300, **COMMON)
settings.load_profile("tests")


def pytest_collection_modifyitems(config, items):
    """Long tests run under `make fuzz` only."""
    if config.getoption("--hypothesis-profile") != "fuzz":
        for item in items:
            if item.get_closest_marker("fuzz"):
                item.add_marker(pytest.mark.skip(reason="long: run by make fuzz, or with --hypothesis-profile=fuzz"))
