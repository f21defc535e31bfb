"""Scaling laws: fits of the runs of a sweep, forecasts, and their grades (docs/scaling.md)."""
