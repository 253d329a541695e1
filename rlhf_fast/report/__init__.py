"""Reports: one self-contained HTML page about a demo or about any run directory."""

from rlhf_fast.report.demo import build_demo_report
from rlhf_fast.report.run import build_report

__all__ = ["build_demo_report", "build_report"]
