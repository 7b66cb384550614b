"""What foreign code, such as the lm-evaluation-harness, leaves behind: nothing on the screen, and no changed states."""

import io
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from loratune.system.environment import kept_environment

_LOADERS = ("huggingface_hub", "datasets")
"""Packages that load rows, whose loggers have handlers of their own."""
_logger = logging.getLogger(__name__)


@contextmanager
def contained() -> Iterator[None]:
    """Inside, what is printed goes to the debug log, random numbers are those that the harness begins with, and it
    starts no processes; random states and environment variables are restored."""
    states = random.getstate(), np.random.get_state()
    printed = io.StringIO()
    try:
        with (
            kept_environment(), torch.random.fork_rng(), redirect_stdout(printed), redirect_stderr(printed),
            _redirected_logs(printed),
        ):  # fmt: skip
            os.environ["DISABLE_MULTIPROC"] = "1"  # the harness's resampling
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for line in printed.getvalue().splitlines():
            _logger.debug(line)


@contextmanager
def _redirected_logs(stream: io.StringIO) -> Iterator[None]:
    """Inside, loaders of rows log to a stream. Their handlers would otherwise stay with the stderr of their import."""
    handlers = [handler for name in _LOADERS for handler in logging.getLogger(name).handlers]
    streams = [
        (handler, handler.setStream(stream)) for handler in handlers if isinstance(handler, logging.StreamHandler)
    ]
    try:
        yield
    finally:
        for handler, before in streams:
            if before is not None:
                handler.setStream(before)
