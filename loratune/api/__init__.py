"""The public API: what `import loratune` offers.

Functions that take long take `on_event`, which is called with what happens meanwhile, see `loratune.events`. Nothing is
printed; signal handlers, warnings and environment variables stay as they are, or are put back. Errors are those of
`loratune.errors`, and each has `.problems`.
"""
