"""Caching inside other libraries' pipelines."""
