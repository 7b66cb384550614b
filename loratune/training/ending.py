"""How a run ended that took all its steps and whose adapter was not published, as a record in its work in progress.

Without it the checkpoints of such a run look like those of an interrupted one, which they are not: to go on from them
would take no step and end in the same way.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from loratune.system.files import read_text

PUBLISH = "publish it with --resume --allow-worse"
"""What can be done with an adapter that does worse than its base."""


@dataclass(frozen=True)
class Ending:
    """The end of a run whose adapter does worse than its base. step: the last one; told: the comparison, in a line."""

    step: int
    told: str

    def keep(self, path: Path) -> None:
        """Write the record; a disk that has no room for it only makes later messages less exact."""
        with suppress(OSError):
            path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def read(path: Path) -> Ending | None:
    """The record of a run that ended; None if there is none, or it is damaged."""
    try:
        values = json.loads(read_text(path))
        ending = Ending(values["step"], values["told"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return ending if type(ending.step) is int and isinstance(ending.told, str) else None
