"""Operating system services: files, signals, processes, and limits for third-party code."""
