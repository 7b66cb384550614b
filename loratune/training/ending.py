"""How a run ended that took all its steps and whose adapter was not published, as a record in its work in progress.

Without it the checkpoints of such a run look like those of an interrupted one, which they are not: to go on from them
would take no step and end in the same way.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from loratune.errors import Problem, ResumeError
from loratune.system import records
from loratune.system.files import read_text

_log = logging.getLogger(__name__)

PUBLISH = "publish it with --resume --allow-worse"
"""What can be done with an adapter that does worse than its base."""


@dataclass(frozen=True)
class Ending:
    """The end of a run whose adapter does worse than its base. step: the last one; told: the comparison, in a line."""

    step: int
    told: str

    def keep(self, path: Path) -> None:
        """Write the record; a disk that has no room for it only makes later messages less exact."""
        try:
            path.write_text(json.dumps(records.versioned(records.ENDED, asdict(self))) + "\n", encoding="utf-8")
        except OSError:
            _log.debug("%s is not kept", path, exc_info=True)


def read(path: Path) -> Ending | None:
    """The record of a run that ended; None if there is none, or it is damaged. Raises ResumeError: a newer version."""
    try:
        values = json.loads(read_text(path))
        if reason := records.newer(records.ENDED, values):
            raise ResumeError(Problem(reason, str(path), fix="upgrade loratune, or start afresh with --overwrite"))
        ending = Ending(values["step"], values["told"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        _log.debug("%s counts as absent", path, exc_info=True)
        return None
    return ending if type(ending.step) is int and isinstance(ending.told, str) else None
