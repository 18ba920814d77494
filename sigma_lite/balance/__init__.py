"""Routing in, losses, metrics and schedules out: the subject of the book. Pure tensors; nothing here knows Lightning."""
