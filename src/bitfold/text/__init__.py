"""Text in: documents, the tokens to calibrate on, the windows to be judged on."""

from __future__ import annotations
