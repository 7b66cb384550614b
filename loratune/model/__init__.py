"""The base model and its tokenizer: where they come from, how they are loaded, and checks of their files."""
