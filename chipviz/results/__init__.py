"""Scores, rules and the record of a run. Never loads torch."""
