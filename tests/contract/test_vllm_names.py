"""Every name of vLLM that we use, in the Python code of every supported minor release. The code is read, not imported,
so a release takes a second once its wheel is there."""

from __future__ import annotations

import get_vllm_python
import pytest
from get_smollm2 import MakeError

from minference_vllm.backend import compat
from minference_vllm.backend.vllm_parts import missing_parts

RELEASES = ("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")


@pytest.mark.contract
@pytest.mark.parametrize(
    "release",
    [*(pytest.param(release, marks=pytest.mark.older_vllm) for release in RELEASES[:-1]), RELEASES[-1]],
)
def test_a_release_has_all_that_we_use(release: str) -> None:
    folder = get_vllm_python.default_folder(release)
    try:
        get_vllm_python.make(release, folder)
    except MakeError as error:
        pytest.skip(str(error))
    assert list(missing_parts(folder / "vllm")) == []


def test_these_are_the_supported_releases() -> None:
    minors = [tuple(map(int, release.split(".")[:2])) for release in RELEASES]
    (major, oldest), (_, newest) = compat.OLDEST, compat.NEWEST
    assert minors == [(major, minor) for minor in range(oldest, newest + 1)]
