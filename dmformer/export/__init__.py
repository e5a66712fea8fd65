"""From a checkpoint to a verified bundle: options, plan, steps, and the loop over them.

``dmformer.export`` is :func:`dmformer.export.run.export`.
"""
