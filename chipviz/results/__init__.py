"""Scores, rules and the record of a run; never loads torch."""
