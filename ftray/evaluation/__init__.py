"""Proof: base and adapter on the same held-out records, and how sure the difference is."""
