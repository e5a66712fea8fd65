"""Is it still the same model: compare what a runtime answers with what PyTorch answered.

``dmformer.verify`` is :func:`dmformer.verify.api.verify`.
"""
