"""What `loratune` asks of the operating system: files, signals, processes, and limits for foreign code."""
