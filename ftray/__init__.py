"""Find the best fine-tuning adapter for your data, prove it and put it in production."""

__version__ = "0.1.0"
