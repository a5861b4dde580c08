"""``python -m minference_vllm``: the command line tool."""

import sys

from minference_vllm.commands.cli import main

sys.exit(main())
