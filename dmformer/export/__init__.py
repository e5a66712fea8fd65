"""From a checkpoint to a verified bundle: options, plan, steps, and the loop over them.

The package itself can be called: ``dmformer.export(...)`` is :func:`dmformer.export.run.export`.
"""

from dmformer._callable import make_callable

make_callable(__name__, "dmformer.export.run:export")
