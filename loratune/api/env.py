"""The public function `loratune.environment`."""

from dataclasses import replace
from typing import TYPE_CHECKING

from loratune.api import default_state, libraries, training
from loratune.config.arguments import checked
from loratune.events import Listener, listening

if TYPE_CHECKING:
    from loratune.api.machine import Environment


@checked
def environment(*, self_test: bool = False, on_event: Listener | None = None) -> "Environment":
    """Find out what this machine has for training, and what to do where something is slow or missing.

    Args:
        self_test: Also train, load and generate with tiny random models on this machine's device, and compare the
            results with those of stock transformers and PEFT; takes up to a minute.
        on_event: Receives events.
    """
    with listening(on_event):
        with libraries():
            from loratune.api import machine

        if not self_test:
            return machine.describe()
        with training(), default_state():
            with libraries():
                from loratune.api import self_test as tests

            checks = tests.run()
        return replace(machine.describe(), checks=checks)  # the page names what failed now
