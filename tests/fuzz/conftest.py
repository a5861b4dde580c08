"""Property tests. The same examples at every run; ``FUZZ=50 pytest tests/fuzz`` draws new ones, fifty times as many."""

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
