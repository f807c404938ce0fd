"""Adapters in the formats of other tools, each proven again on what was written."""
