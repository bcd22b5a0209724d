"""Loggers: CSV, TensorBoard, Weights & Biases."""
