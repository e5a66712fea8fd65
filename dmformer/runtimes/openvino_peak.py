"""What OpenVINO attains at int8 on this machine: a pointwise convolution large enough to keep its units busy."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from dmformer._optional import require

_CHANNELS = 1024
_SIZE = 32
_CALLS = 8


def int8_gops(threads: int) -> float:
    """10^9 operations a second, a multiply and an add being two; the best of a few calls.

    uint8 activations and int8 weights, as a quantised network has them. The two casts of the activations are in the
    time; they are a thousandth of the arithmetic.
    """
    ov: Any = require("openvino", extra="openvino", purpose="the limit at int8")
    ops: Any = require("openvino.opset13", extra="openvino", purpose="the limit at int8")
    rng = np.random.default_rng(0)
    entry = ops.parameter([1, _CHANNELS, _SIZE, _SIZE], np.float32)
    least, most = np.float32(0), np.float32(255 / 256)
    quantised = ops.fake_quantize(entry, least, most, least, most, 256)
    weights = ops.constant(rng.integers(-127, 128, (_CHANNELS, _CHANNELS, 1, 1)).astype(np.int8))
    scale = ops.constant(np.full((_CHANNELS, 1, 1, 1), 1 / 127, np.float32))
    scaled = ops.multiply(ops.convert(weights, "f32"), scale)
    product = ops.convolution(quantised, scaled, [1, 1], [0, 0], [0, 0], [1, 1])
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = ov.Core().compile_model(ov.Model([product], [entry]), "CPU", settings).create_infer_request()
    image = rng.random((1, _CHANNELS, _SIZE, _SIZE), dtype=np.float32)
    request.infer({0: image})
    best = min(_seconds(lambda: request.infer({0: image}, share_inputs=True)) for _ in range(_CALLS))
    return 2 * _CHANNELS**2 * _SIZE**2 / best / 1e9


def _seconds(call: Any) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before
