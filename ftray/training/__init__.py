"""The training step in plain PyTorch, PEFT and DeepSpeed. Imports no Ray: it runs in one plain process too."""
