"""Adapters: from a method's name and parameters to a PEFT model, and merged back into the base."""
