"""One base model, many adapters, one pass. Plain PyTorch and PEFT; used by training and by serving."""
