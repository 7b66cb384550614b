"""The fused operations: C code compiled for the processor, and a reference in torch for other machines."""
