"""How much Hypothesis generates: `make test` takes the profile "tests", `make fuzz` the profile "fuzz"."""

from hypothesis import HealthCheck, settings

COMMON = {
    "deadline": None,  # no time limits in tests; the first call of an operator is slow
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
settings.register_profile("tests", max_examples=20, derandomize=True, **COMMON)
settings.register_profile("fuzz", max_examples=300, **COMMON)
settings.load_profile("tests")
