"""The network, its variants and its checkpoints."""
