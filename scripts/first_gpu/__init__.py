"""What loratune does on its first GPU: `scripts/gpu.sh` says how to run it."""
