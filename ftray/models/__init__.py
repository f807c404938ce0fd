"""Base models: finding one by name, loading it frozen, in the precision asked for."""
