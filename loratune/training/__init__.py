"""Training, from rows and a model with LoRA to a finished run: batches, Trainer, checkpoints, processes."""
