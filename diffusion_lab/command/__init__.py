"""Command line: train, evaluate, sweeps, launchers."""
