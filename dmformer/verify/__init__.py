"""Is it still the same model: compare what a runtime answers with what PyTorch answered."""
