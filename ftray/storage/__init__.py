"""Where a run lies: local or in an object store, one protocol; what is whole, who holds it."""
