"""Quantization after training: `quantize_(lm, "int4", calibration=text)`.

Needs torch. Rounds the weights of a model in place, with the help of a text as far as it pays;
`python -m mobilellm_fast.ptq` does it from the command line and reports what it costs.
"""

from .quantize import dequantize_, quantize_
from .report import Line, report

__all__ = ["Line", "dequantize_", "quantize_", "report"]
