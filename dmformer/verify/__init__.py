"""Is it still the same model: compare what a runtime answers with what PyTorch answered.

The package itself can be called: ``dmformer.verify(...)`` is :func:`dmformer.verify.api.verify`.
"""

from dmformer._callable import make_callable

make_callable(__name__, "dmformer.verify.api:verify")
