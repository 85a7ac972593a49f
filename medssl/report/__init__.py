"""A run folder becomes one self-contained HTML page: reads files only, trains and predicts nothing.

Reading order: sentences (what is said of a run folder), figures and scans (what is shown), page
(all of it into template.html).
"""

from medssl.report.page import write_report

__all__ = ["write_report"]
