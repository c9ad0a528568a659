"""Benchmarks: one script a question. Each prints a table and ends with one line of JSON."""
