"""The Ray cluster, preemption of its nodes, and metrics."""
