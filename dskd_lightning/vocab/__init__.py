"""What ``dskd vocab`` does: compare two tokenizers, recommend an objective, draw alignments."""

from dskd_lightning.vocab.analysis import analyze_vocabularies
from dskd_lightning.vocab.heatmap import save_heatmap
from dskd_lightning.vocab.report import VocabReport
from dskd_lightning.vocab.run import run_vocab

__all__ = ["VocabReport", "analyze_vocabularies", "run_vocab", "save_heatmap"]
