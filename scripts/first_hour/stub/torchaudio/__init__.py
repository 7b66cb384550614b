"""Nothing: LLaMA-Factory imports torchaudio, whose build for CUDA does not load beside a build of torch for CPUs."""
