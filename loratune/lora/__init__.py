"""LoRA on a base model, through PEFT: target modules, initialization, and the adapter directory."""
