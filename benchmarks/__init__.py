"""Figures of speed and quality, each written to benchmarks/results by a script of its own."""
