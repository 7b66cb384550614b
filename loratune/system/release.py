"""This release: its version, the commit that it was built from, and its compiled code for this processor."""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loratune import __version__
from loratune.system import environment
from loratune.system.files import read_text

_COMMIT = "[0-9a-f]{12,40}(-dirty)?"
RECORD = Path(__file__).with_name("release.json")
"""What `scripts/build_backend.py` records in sdists and wheels; a checkout has no such file. `commit`: empty if it was
not known. `variants`, in wheels with compiled code: its processor variants, the best one first, each with the required
processor features."""


def describe() -> str:
    """Version, commit and compiled code in one line. Neither torch nor the compiled code is loaded."""
    found = commit()
    return f"{__version__} ({f'commit {found}, ' if found else ''}{compiled_code()})"


def commit() -> str:
    """The first 12 digits of the commit, as recorded by the build, or from git in a checkout; empty if not known.

    `-dirty` behind it: the build had files that differ from the commit's.
    """
    recorded, root = _record(), Path(__file__).parents[2]
    if recorded != {} or not (root / ".git").exists():
        return str((recorded or {}).get("commit", ""))
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    variables = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    variables["GIT_CEILING_DIRECTORIES"] = str(root.parent)  # a damaged repository is not one above it
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        if '\nname = "loratune"\n' in read_text(root / "pyproject.toml"):  # not one it was copied to
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=2, check=True)
            return _word(done.stdout.strip(), _COMMIT)
    return ""


def compiled_code() -> str:
    """Which compiled operations train on this processor, unless loading them fails: `loratune env` loads them."""
    if os.environ.get("LORATUNE_NATIVE") == "0":
        return "no compiled code, as LORATUNE_NATIVE is 0"
    if platform.system() != "Linux":
        return f"no compiled code, as none is for {platform.system()}"
    if (record := _record()) is None:
        return f"unknown compiled code, as {RECORD.name} is damaged; install loratune again"
    has = environment.features()
    if name := next((name for name, needed in record.get("variants", {}).items() if has.issuperset(needed)), ""):
        return f"compiled code for {name}"
    if any(map(shutil.which, ("gcc", "cc", "clang"))):
        return "code compiled on this machine"
    return "no compiled code, as there is no C compiler"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed versions of packages; that of loratune itself is of its code, also in a checkout."""
    return {name: __version__ if name == "loratune" else version(name) for name in packages}


def _record() -> dict[str, Any] | None:
    """The record; empty if there is no file. None: it is damaged, or was not written by a build."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if not RECORD.exists():
            return {}
        found = json.loads(read_text(RECORD.resolve()))  # installers may link to files in a cache
        variants = {_word(name): [*map(_word, needed)] for name, needed in found["variants"].items()}
        return {"commit": _word(found["commit"], f"({_COMMIT})?"), "variants": variants}
    return None


def _word(value: str, pattern: str = r"[\w.-]{1,40}") -> str:
    if re.fullmatch(pattern, value) is None:
        raise ValueError(value)
    return value
