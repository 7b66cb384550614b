"""The public functions that count: `loratune.count_parameters`, and `adapter_stats` of the command line."""

from pathlib import Path
from typing import TYPE_CHECKING

from loratune.api import StrPath, computing, libraries
from loratune.api.train import note_portability
from loratune.config import RunConfig
from loratune.config.arguments import checked
from loratune.events import Listener, listening

if TYPE_CHECKING:
    from loratune.lora.stats import AdapterStats
    from loratune.training.params import Params


@checked
def count_parameters(config: RunConfig, *, on_event: Listener | None = None) -> "Params":
    """Count trainable parameters and estimate the memory for training, from the model's configuration alone.

    Raises:
        ModelError, ConfigError, AdapterError: The model's configuration, the targets, or the adapter to start from
            cannot be used.
    """
    with listening(on_event):
        note_portability(config)
        with computing():
            with libraries():
                from loratune.training import params

            return params.params(config)


@checked
def adapter_stats(path: StrPath) -> "AdapterStats":
    """Statistics from the files of an adapter, without its base: rank, scaling, norm and effective rank of each update.

    Raises AdapterError: It is not an adapter directory, or its tensors are not finite or have mismatched shapes.
    """
    with computing():
        from loratune.lora import adapter_files, stats

        return stats.adapter_stats(adapter_files.inspect(Path(path)))
