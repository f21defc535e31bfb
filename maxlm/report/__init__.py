"""A run as a page of plots, or several beside each other (docs/report.md)."""
