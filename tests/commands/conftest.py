"""Fixtures of the tests of the command line tool."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from command_inputs import Ended

from minference_vllm.commands.cli import main


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run the tool in this process."""

    def run(*arguments: object) -> Ended:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return run
