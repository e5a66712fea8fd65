"""Inference engines behind one contract (``base``) and one table (``registry``)."""
