"""medssl: segment medical scans when only a few are annotated."""

import os as _os

# Read when torch and numpy are loaded. Threads that spin for long while they wait take the core
# from the very thread that they wait for, where another program shares it; those that never spin
# are asleep when the next piece of a step comes. BLAS has little to do here.
for _name, _value in (
    *(() if "OMP_WAIT_POLICY" in _os.environ else (("GOMP_SPINCOUNT", "300000"),)),
    ("OMP_WAIT_POLICY", "PASSIVE"),
    ("KMP_BLOCKTIME", "0"),
    ("OPENBLAS_NUM_THREADS", "1"),
):
    _os.environ.setdefault(_name, _value)

__version__ = "0.2.0.dev0"
