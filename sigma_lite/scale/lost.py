"""A rank that has died or hangs, told from errors of our own making."""

from __future__ import annotations

SIGNS = ("closed by peer", "Connection reset", "Timed out", "timed out", "Socket Timeout", "remote process exited")


def lost_rank(error: RuntimeError) -> str:
    """What to tell a person when a collective failed because another rank is not there; "" for any other error.

    gloo raises plain RuntimeErrors and NCCL DistBackendErrors, so their words are all there is to go by.
    """
    first = str(error).strip().split("\n")[0]
    if type(error).__name__ not in ("RuntimeError", "DistBackendError") or not any(sign in first for sign in SIGNS):
        return ""
    return f"another rank has ended or does not answer: its own output says why ({first[:200]})"
