"""Which objective to begin with, from what two tokenizers share."""

from __future__ import annotations

from dskd_lightning.vocab.report import Recommendation, VocabReport

__all__ = ["recommend"]

MANY_EXACT = 0.8
"""Share of the student's tokens in exact pairs from which pairs alone carry the teacher's signal."""
SOME_EXACT = 0.4
"""Share from which pairs are worth a term of their own beside groups."""
MUCH_LOST = 0.2
"""Share of tokens without any counterpart from which groups no longer cover the text."""

_BASE = "dskd_lightning.objectives."


def recommend(report: VocabReport) -> Recommendation:
    """A rule of thumb over the counts of ``report``; no model is looked at.

    The same ids on both sides need no alignment. Else what decides is how much of the text the two
    sides cut alike, and whether byte-exact groups cover the rest.
    """
    shares = report.student_coverage.shares()
    exact, lost = shares["exact_occurrences"], shares["no_counterpart_occurrences"]
    if report.identical:
        alone = abs(report.student_size - report.teacher_size)
        but = f", but for {alone} that one side has alone" if alone else ""
        return Recommendation(
            _BASE + "DSKDv2Objective", f"both sides read the same ids{but}: no alignment is needed"
        )
    if not report.student_coverage.occurrences:
        return Recommendation(_BASE + "DSKDCrossAttentionObjective", "there is no text to judge the pair by")
    if lost > MUCH_LOST:
        return Recommendation(
            _BASE + "DSKDCrossAttentionObjective",
            f"{lost:.0%} of the student's tokens have no byte-exact counterpart, and its soft alignment "
            "needs none",
        )
    if exact >= MANY_EXACT:
        return Recommendation(
            _BASE + "DSKDTokenAlignmentObjective",
            f"{exact:.0%} of the student's tokens pair one to one with a teacher token",
        )
    if exact >= SOME_EXACT:
        return Recommendation(
            _BASE + "GOLDObjective",
            f"{exact:.0%} of the student's tokens pair one to one, "
            f"{shares['grouped_occurrences']:.0%} only in larger groups, which its merged spans cover too",
        )
    return Recommendation(
        _BASE + "ALMObjective",
        f"only {exact:.0%} of the student's tokens pair one to one, "
        "and it compares likelihoods of whole groups",
    )
