"""Datasets: importing, preparing, planning and reading."""
