"""Losses become steps, steps become checkpoints. Lightning is known here, in data/datamodule.py and in scale/strategy.py."""
