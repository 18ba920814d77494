"""One run as one self-contained HTML page: `sigma-lite report RUN`."""

from sigma_lite.report.page import write_report

__all__ = ["write_report"]
