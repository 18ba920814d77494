"""Work that goes on beside training: a checkpoint is copied in a moment and written in a minute."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Calls one job after another in a thread; what one raises is raised by the next call, or by `wait`.

    The interpreter waits for a job before it ends, so only a kill can cut one off.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __call__(self, job: Callable[[], object]) -> None:
        """Start a job, once the one before has ended."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="writer")
        self._thread.start()

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether there is an error that `wait` would raise."""
        return self._error is not None

    def wait(self) -> None:
        """Until nothing is under way. Raises what the job raised."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
