"""From a checkpoint to artifacts: each module is one arrow, ``pipeline`` only puts them together.

The package itself can be called: ``dmformer.export(...)`` is :func:`dmformer.export.api.export`.
"""

from dmformer._callable import make_callable

make_callable(__name__, "dmformer.export.api:export")
