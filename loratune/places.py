"""Where a model is: a directory of this machine, or a repository of the hub. Told apart without torch."""

from pathlib import Path

from loratune.errors import ModelError, Problem

KEY = "model.name_or_path"


def is_directory(name_or_path: str, revision: str | None = None, *, trusted: bool = False) -> bool:
    """Whether this is a model directory; False leaves a name that may be a hub id.

    revision is for hub ids only, but for trusted code, which is always pinned.
    Raises ModelError: a path where nothing is, a file, a directory without a model, a directory and a revision.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None and not trusted:
            raise ModelError(Problem("a directory has no revisions", name_or_path, "model.revision", "leave it out"))
        if not (path / "config.json").is_file():
            fix = "name the directory that has one"
            raise ModelError(Problem("no config.json in this directory, so it holds no model", name_or_path, KEY, fix))
        return True
    if path.exists():
        fix = "name its directory"
        raise ModelError(Problem("is a file, not a model directory", name_or_path, KEY, fix))
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ModelError(Problem("no such directory", name_or_path, KEY, "check the path"))
    return False


def local_or_hub(name_or_path: str) -> str:
    """The name by which a model can be found from anywhere: an absolute path for a directory, else the hub id."""
    path = Path(name_or_path).expanduser()
    return str(path.absolute()) if path.is_dir() else name_or_path
