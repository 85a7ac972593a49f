"""medssl: segment medical scans when only a few are annotated."""

__version__ = "0.1.0"
