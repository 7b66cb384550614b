"""How well an adapter does: its figures with their intervals, compared with its base or with another adapter."""
