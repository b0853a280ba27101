"""Several runs side by side: paired statistics, gate, judge, report."""

from dskd_lightning.comparison.bootstrap import PairedTest, holm, paired_test
from dskd_lightning.comparison.compare import Comparison, compare, compare_all
from dskd_lightning.comparison.compare_runs import compare_runs
from dskd_lightning.comparison.endpoint import ChatEndpoint
from dskd_lightning.comparison.gate import parse_condition
from dskd_lightning.comparison.judge import CostLimit, Judgement, JudgeSummary, judge_pairs
from dskd_lightning.comparison.report import ReportData, write_report

__all__ = [
    "ChatEndpoint",
    "Comparison",
    "CostLimit",
    "JudgeSummary",
    "Judgement",
    "PairedTest",
    "ReportData",
    "compare",
    "compare_all",
    "compare_runs",
    "holm",
    "judge_pairs",
    "paired_test",
    "parse_condition",
    "write_report",
]
