"""Learning back what rounding lost: a quantized model trained against its original, codes frozen."""

from __future__ import annotations
