"""`python -m loratune`, with accelerate made to believe that the CPUs of several processes are GPUs: it knows FSDP for
devices only, and passes over a config file that asks for it elsewhere. There is no GPU where the tests run."""

import os
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from loratune.__main__ import main

original = PartialState.__init__


def patched(self: Any, *arguments: Any, **keywords: Any) -> None:
    original(self, *arguments, **keywords)
    asked = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if asked and self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = patched
if __name__ == "__main__":  # and not in a process that is forked, which goes on to the command by itself
    main()
