"""From a checkpoint to artifacts: each module is one arrow, ``pipeline`` only puts them together."""
