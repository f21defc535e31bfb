"""A pod on your desk: the real step compiled ahead of time for a TPU slice, read, and reported (docs/plan.md)."""
