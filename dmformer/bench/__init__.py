"""How fast is it: time a runtime, one process a configuration.

The package itself can be called: ``dmformer.bench(...)`` is :func:`dmformer.bench.api.bench`.
"""

from dmformer._callable import make_callable

DEFAULT_DURATION_S = 3.0  # of steady state for each configuration, over all rounds

make_callable(__name__, "dmformer.bench.api:bench")
