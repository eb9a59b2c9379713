"""Shorten a model, and what that saves."""
