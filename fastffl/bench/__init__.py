"""Benchmarks: how things are timed, what the kernels are timed against, and whether the goals are met."""
