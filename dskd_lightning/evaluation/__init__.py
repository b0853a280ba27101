"""What a student is worth: generation, metrics, comparison, cost and a report."""

from dskd_lightning.evaluation.bootstrap import PairedTest, holm, paired_test
from dskd_lightning.evaluation.compare import Comparison, compare, compare_all
from dskd_lightning.evaluation.compare_runs import compare_runs
from dskd_lightning.evaluation.efficiency import Efficiency, measure_efficiency
from dskd_lightning.evaluation.endpoint import ChatEndpoint
from dskd_lightning.evaluation.environment import collect_environment
from dskd_lightning.evaluation.gate import parse_condition
from dskd_lightning.evaluation.generation import Generation, GenerationSettings, Generator
from dskd_lightning.evaluation.harness import run_harness
from dskd_lightning.evaluation.judge import CostLimit, Judgement, JudgeSummary, judge_pairs
from dskd_lightning.evaluation.metrics import (
    DistinctN,
    ExactMatch,
    Perplexity,
    ResponseLength,
    RougeL,
    exact_match,
)
from dskd_lightning.evaluation.predict import PAPER_SEEDS, PromptRecord, predict
from dskd_lightning.evaluation.predictions import Prediction, describe_problems, read_predictions
from dskd_lightning.evaluation.report import ReportData, write_report
from dskd_lightning.evaluation.representation import (
    cosine_structure_distance,
    effective_rank,
    inner_product_structure_distance,
    linear_cka,
    singular_values,
)
from dskd_lightning.evaluation.rouge import rouge_l
from dskd_lightning.evaluation.run_folder import AlignmentMap, RunFolder
from dskd_lightning.evaluation.tables import CompletionTable
from dskd_lightning.evaluation.writer import PredictionWriter

__all__ = [
    "PAPER_SEEDS",
    "AlignmentMap",
    "ChatEndpoint",
    "Comparison",
    "CompletionTable",
    "CostLimit",
    "DistinctN",
    "Efficiency",
    "ExactMatch",
    "Generation",
    "GenerationSettings",
    "Generator",
    "JudgeSummary",
    "Judgement",
    "PairedTest",
    "Perplexity",
    "Prediction",
    "PredictionWriter",
    "PromptRecord",
    "ReportData",
    "ResponseLength",
    "RougeL",
    "RunFolder",
    "collect_environment",
    "compare",
    "compare_all",
    "compare_runs",
    "cosine_structure_distance",
    "describe_problems",
    "effective_rank",
    "exact_match",
    "holm",
    "inner_product_structure_distance",
    "judge_pairs",
    "linear_cka",
    "measure_efficiency",
    "paired_test",
    "parse_condition",
    "predict",
    "read_predictions",
    "rouge_l",
    "run_harness",
    "singular_values",
    "write_report",
]
