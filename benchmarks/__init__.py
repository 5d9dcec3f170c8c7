"""Benchmarks that users can run; each prints ratios or differences to the raw cost of the same work, in one run."""
