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

RECORD = Path(__file__).with_name("release.json")
"""What `scripts/build_backend.py` records in sdists and wheels; a checkout has no such file. `commit`: empty if it was
not known. `variants`, in wheels with compiled code: its processor variants, the best one first, each with the required
processor features."""


def describe() -> str:
    """Version, commit and compiled code in one line. Neither torch nor the compiled code is loaded."""
    found = commit()
    return f"{__version__} ({f'commit {found}, ' if found else ''}{compiled_code()})"


def commit() -> str:
    """The first 12 digits of the commit, as recorded by the build, or from git in a checkout; empty if not known."""
    recorded, git = _record(), Path(__file__).parents[2] / ".git"
    if recorded != {} or not git.exists():
        return str((recorded or {}).get("commit", ""))
    command = ["git", f"--git-dir={git}", "rev-parse", "--short=12", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=2, check=True).stdout.strip()
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
        found = json.loads(RECORD.read_text(encoding="utf-8"))
        variants = {_word(name): [*map(_word, needed)] for name, needed in found["variants"].items()}
        return {"commit": found["commit"] and _word(found["commit"], "[0-9a-f]{12,40}"), "variants": variants}
    return None


def _word(value: str, pattern: str = r"[\w.-]{1,40}") -> str:
    if re.fullmatch(pattern, value) is None:
        raise ValueError(value)
    return value
