"""The hub of models: the ways in which one is not to be had there."""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import errors as hub
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from loratune.errors import ModelError, Problem
from loratune.model import gguf, remote_code, source
from loratune.model.faults import summary


def check(name: str, revision: str | None, file: str = "config.json") -> None:
    """Tell the ways apart in which a model is not to be had; transformers reports most of them as one OSError.

    Raises ModelError: no such repository, gated, no such revision, without that file, offline and not cached.
    """
    fix, key = "", source.KEY
    try:
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=10)
    except hub.GatedRepoError:
        what = "this repository is gated"
        fix = f"accept its terms on https://huggingface.co/{name} and log in with `hf auth login`"
    except hub.RevisionNotFoundError:
        what, key = f"the repository has no revision {revision}", "model.revision"
    except hub.RepositoryNotFoundError:
        what = "no such directory, and no such repository on the hub"
        fix = "check the name; private ones need `hf auth login`"
    except hub.EntryNotFoundError:
        what = f"the repository has no {file}" + (", so it holds no model" if file == "config.json" else "")
        key = source.KEY if file == "config.json" else gguf.KEY
    except hub.HFValidationError:
        what = "no such directory, and not the id of a repository"
    except Exception as error:  # whatever the network stack of the day raises
        what = f"no such directory; the hub cannot be reached and the model is not cached ({summary(error)})"
        fix = "check the path, or the connection"
    else:
        return
    raise ModelError(Problem(what, name, key, fix))


def fetch(name: str, revision: str | None, file: str) -> Path:
    """The path of one file of a repository, downloaded if it is not in the cache.

    Raises ModelError: as `check`; the connection breaks off.
    """
    check(name, revision, file)
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except Exception as error:  # whatever the network stack of the day raises
        raise ModelError(Problem(f"{file} cannot be fetched: {summary(error)}", name, gguf.KEY)) from None


def naming_code(name: str, revision: str | None) -> Iterator[Path]:
    """The files of a repository that may name code, downloaded if they are not in the cache. Those that it does not
    have, or that cannot be had now, are left out: transformers does not get them either."""
    cut_off = False
    for file in remote_code.FILES:
        try:
            yield Path(hf_hub_download(name, file, revision=revision, local_files_only=cut_off))
        except hub.LocalEntryNotFoundError:
            cut_off = True  # it was tried several times, and would be again for each file
        except hub.EntryNotFoundError:
            continue
