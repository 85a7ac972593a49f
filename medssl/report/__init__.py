"""A run folder becomes one self-contained HTML page: reads files only, trains and predicts nothing.

Reading order: read (files -> records), sentences (what is said), figures and overlays (what is
shown), page (all of it into template.html).
"""

from medssl.report.page import write_report

__all__ = ["write_report"]
