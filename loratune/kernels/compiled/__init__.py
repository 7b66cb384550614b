"""The fused operations: C compiled for the processor, and the reference in torch that runs where it cannot be."""
