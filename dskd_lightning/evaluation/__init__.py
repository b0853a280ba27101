"""Scores of one run: text metrics, representation, efficiency, predictions of a prompt file."""

from dskd_lightning.evaluation.efficiency import Efficiency, measure_efficiency
from dskd_lightning.evaluation.harness import run_harness
from dskd_lightning.evaluation.metrics import (
    DistinctN,
    ExactMatch,
    ResponseLength,
    RougeL,
    exact_match,
)
from dskd_lightning.evaluation.predict import PAPER_SEEDS, PromptRecord, predict
from dskd_lightning.evaluation.representation import (
    cosine_structure_distance,
    inner_product_structure_distance,
    linear_cka,
)
from dskd_lightning.evaluation.rouge import rouge_l
from dskd_lightning.evaluation.writer import PredictionWriter
from dskd_lightning.functional.spectrum import effective_rank, singular_values

__all__ = [
    "PAPER_SEEDS",
    "DistinctN",
    "Efficiency",
    "ExactMatch",
    "PredictionWriter",
    "PromptRecord",
    "ResponseLength",
    "RougeL",
    "cosine_structure_distance",
    "effective_rank",
    "exact_match",
    "inner_product_structure_distance",
    "linear_cka",
    "measure_efficiency",
    "predict",
    "rouge_l",
    "run_harness",
    "singular_values",
]
