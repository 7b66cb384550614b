"""Adapter directories in use: selected, loaded on their base, and asked to complete prompts."""
