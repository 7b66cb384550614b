"""Six tools in their first hour: what each is given, what is done to it, and the tables."""
