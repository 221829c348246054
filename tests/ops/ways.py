"""The native kernels, and the instruction sets that they can run with here."""

from cmr_fast.ops import _dispatch

NATIVE = _dispatch.native()
ISAS = NATIVE.available_isas() if not isinstance(NATIVE, ImportError) else []
