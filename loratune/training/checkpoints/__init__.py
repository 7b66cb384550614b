"""The run directory `<output_dir>.partial/`, the checkpoints in it, and how a run resumes from them."""
