"""LoRA on a base model, by PEFT: its target modules, its initialization, and its adapter directory."""
