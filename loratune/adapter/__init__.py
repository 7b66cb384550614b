"""Trained adapters: the directory on disk, and the adapter loaded on its base.

    directory = AdapterDirectory.open(Path("out"))      # verified against its record, without torch
    loaded = loading.load(directory)                    # the base and the adapter, checked to belong together
    loaded.complete([loaded.renderer.prompt("...", "prompt 1")], 64)
    with loaded.without_adapter(): ...                  # the base alone

`loading.load_all` attaches several adapters to one base, and `loading.load_selection` also their weighted sum. `card`
writes the model card and the record of a directory. This package does not depend on training.
"""
