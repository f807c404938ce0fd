"""From a request to its answer: one base model, many adapters, one batch."""
