"""Losses become steps, steps become checkpoints: the only rooms, with data/datamodule.py and cli.py, that know Lightning."""
