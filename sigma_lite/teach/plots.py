"""Figures of the chapters as pure functions: arrays in, plotly figure out."""
