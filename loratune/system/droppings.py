"""Files that systems, Jupyter and the hub's client leave in any directory, and that carry nothing of a user's.

They neither keep a directory from being replaced nor count as a change of it.
"""

import re

_NAMES = frozenset({".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".directory"})
_TEMPLATES = "additional_chat_templates/"  # from which transformers reads whatever ends in .jinja
_NOTEBOOK = re.compile(r"(?P<place>(?:.*/)?)\.ipynb_checkpoints/(?P<stem>[^/]+)-checkpoint(?P<ending>\.[^./]+)?")


def is_dropping(name: str) -> bool:
    """Whether a file is one. name: its path within a directory that is taken as a whole, with `/`."""
    last = name.rpartition("/")[2]
    named = last.lower() in _NAMES or (last.startswith("._") and not name.startswith(_TEMPLATES))
    return named or name == ".gitattributes" or name.startswith(".cache/huggingface/")


def is_dropped_directory(name: str) -> bool:
    """Whether a directory is one, should it be empty."""
    return name == ".cache" or f"{name}/".startswith(".cache/huggingface/") or name.endswith(".ipynb_checkpoints")


def original(name: str) -> str | None:
    """The file that Jupyter keeps a copy of under this name; None if it is no such copy."""
    found = _NOTEBOOK.fullmatch(name)
    return f"{found['place']}{found['stem']}{found['ending'] or ''}" if found else None
