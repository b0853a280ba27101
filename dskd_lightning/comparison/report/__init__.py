"""One self-contained HTML file that says which run is better, and shows why."""

from dskd_lightning.comparison.report.build import ReportData, write_report
from dskd_lightning.comparison.report.content import GateResult
from dskd_lightning.comparison.report.diff import Segment, word_diff

__all__ = ["GateResult", "ReportData", "Segment", "word_diff", "write_report"]
