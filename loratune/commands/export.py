"""`loratune export`: writes an adapter as another program reads it, reads it back, and compares."""

from loratune.commands.export_gguf import export_adapter, export_merged, export_ollama
from loratune.commands.export_order import Exported, Log, Order
from loratune.commands.export_plain import export_plain
from loratune.data import DatasetSplit, ProgressFactory
from loratune.export import converter, gguf, llama_cpp
from loratune.training.preflight import AdapterInfo
from loratune.training.run_dir import RunDirectory


def export(
    source: AdapterInfo,
    directory: RunDirectory,
    order: Order,
    split: DatasetSplit | None,
    watch: ProgressFactory,
    log: Log,
) -> Exported:
    """Write an adapter for one client.

    Args:
        source: The adapter.
        directory: Where to, see `output.check`.
        order: What the user wants.
        split: The rows that the user wants it compared on.
        watch: Shows progress.
        log: Takes lines about the adapter.

    Raises:
        AdapterError: The adapter does not fit the client or its base, or what was written is not the adapter.
        ConfigError: There are no converters of llama.cpp.
        ModelError, DataError: The base or the rows cannot be used.
        ResourceError: The disk is full.
    """
    if order.to in ("peft", "vllm"):
        return export_plain(source, directory, order, split, watch, log)
    converters = converter.find(order.llama_cpp)
    gguf.check_package()
    if not llama_cpp.is_installed():
        log(f"llama.cpp will not be run: {llama_cpp.INSTALL}")
    if order.to == "ollama":
        return export_ollama(source, directory, order, split, log, converters)
    make = export_merged if order.merged else export_adapter
    return make(source, directory, order, split, log, converters)
