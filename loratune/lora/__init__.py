"""LoRA on a base model, by PEFT: which modules get it, how it begins, and the adapter directory it is kept in."""
