"""Output for other programs: merged models, adapters for other clients, uploads.

Everything written is read back, by the program that will use it or by the closest available one, and compared.
"""
