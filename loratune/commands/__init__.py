"""The implementation of each command, one module per command, without parsing and printing."""
