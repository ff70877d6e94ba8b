"""Synthetic cohorts of T1 scans whose anatomy follows volumes fitted to real people."""

from sparsekit.fed.cohort.make.cohort import CohortSettings, make_cohort

__all__ = ["CohortSettings", "make_cohort"]
