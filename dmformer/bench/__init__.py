"""How fast is it: time a runtime, one process a configuration.

``dmformer.bench`` is :func:`dmformer.bench.api.bench`.
"""

DEFAULT_ROUNDS = 3  # processes a configuration
DEFAULT_LIMIT_S = 120.0  # after which a process is ended
DEFAULT_DURATION_S = 3.0  # of steady state for each configuration, over all rounds
