"""Environment variables: the caches that they name, and foreign code that changes them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


@contextmanager
def kept_environment() -> Iterator[None]:
    """Restore all environment variables at the end, whatever was set or deleted inside."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def cache_fix(error: BaseException | None) -> str:
    """What to do where a cache of Hugging Face's libraries cannot be used; empty if an error has another reason.

    The variables are documented: https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    caches = {name: path for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE") if (path := os.environ.get(name))}
    caches["HF_HOME"] = os.environ.get("HF_HOME") or str(default)
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSED and error.filename:
            for name, path in caches.items():
                if Path(os.fsdecode(error.filename)).is_relative_to(Path(path).expanduser()):
                    return f"set {name} to a directory that you can write to"
        error = error.__cause__ or error.__context__
    return ""
