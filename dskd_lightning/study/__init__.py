"""Several variants of one configuration at the same budget, in one table."""

from dskd_lightning.study.study import Study, Variant

__all__ = ["Study", "Variant"]
