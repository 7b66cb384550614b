"""What leaves loratune for other programs: merged models, adapters for other clients, uploads.

Whatever is written was read back by the program that will use it, or by the nearest thing to it, and compared.
"""
