"""How a step is taken: what it accumulates, what its gradients are divided by, and who steps. Knows no paradigm."""
