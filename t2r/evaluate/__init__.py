"""Evaluation of a model, and comparison of a converted model with its original."""
