"""Create vLLM's configuration for several cases: ``python configure_process.py CASES.json ERRORS.json``.

The cases: name -> arguments of ``EngineArgs``. The errors: name -> message, or null if the configuration was created.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def error_of(arguments: dict[str, Any]) -> str | None:
    from vllm.engine.arg_utils import EngineArgs

    defaults: dict[str, Any] = {
        "attention_backend": "minference",
        "skip_tokenizer_init": True,
        "max_model_len": 256,
    }
    try:
        EngineArgs(**{**defaults, **arguments}).create_engine_config()
    except Exception as error:
        return str(error)
    return None


# Importing a model's class is left to processes that import this file again.
if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({name: error_of(arguments) for name, arguments in cases.items()}))
