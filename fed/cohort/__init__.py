"""Cohorts of T1 scans: make a synthetic one, read, check and cache what users bring."""
