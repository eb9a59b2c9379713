"""Figures: plain data in, a plotly figure or HTML out."""
