"""What a machine runs a bundle with best, within a budget.

``dmformer.tune`` is :func:`dmformer.tuning.api.tune`.
"""
