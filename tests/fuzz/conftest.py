"""Property tests with the same examples in every run. ``FUZZ=50 pytest tests/fuzz`` draws 50 times as many new ones."""

from __future__ import annotations

import hypothesis
from fuzz_inputs import FACTOR

hypothesis.settings.register_profile(
    "fuzz",
    derandomize=not FACTOR,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("fuzz")
