"""One of our methods, as a user would run it; the same arguments and answer as the peers' scripts."""

from __future__ import annotations

import json
import time

from common import arguments

import bitfold
from bitfold.calibration.options import settings

options = arguments()
method = f"signround:{options.steps}" if options.method == "signround" else options.method
text = settings(method, None, options.nsamples, options.seqlen)
started, cpu = time.perf_counter(), time.process_time()
report = bitfold.quantize(options.model, options.out, method=method, bits=options.bits, calibration=text)
facts = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
print(json.dumps({**facts, "peak_memory": report.peak_memory, "bpw": report.bpw_quantized}))
