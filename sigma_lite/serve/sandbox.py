"""Run a model's Python in a process of its own, with limits: seconds, memory, no files, no network, no other programs.

It keeps accidents in: endless loops, huge lists, files written by mistake. It is no prison for code that wants out, which an
audit hook in the same process cannot be; give such code a container or a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

from sigma_lite.config import require

# Runs first in the new process. Success is a word that the code does not know: sys.exit(0) is none.
GUARD = """
import resource, sys
word, seconds, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
code = sys.stdin.read()
for limit, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, size), (resource.RLIMIT_FSIZE, 1 << 16),
                     (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 32)):
    resource.setrlimit(limit, (value, value))
REFUSED = ("socket.", "subprocess.", "shutil.", "ctypes.", "signal.", "pty.", "os.system", "os.exec", "os.fork", "os.kill",
           "os.posix_spawn", "os.spawn", "os.startfile", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link",
           "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.putenv")
def guard(event, args):
    if event.startswith(REFUSED):
        raise PermissionError("refused in the sandbox: " + event)
    if event == "open" and (set(str(args[1] or "")) & set("wax+") or (args[2] or 0) & 0o3):
        raise PermissionError("refused in the sandbox: writing a file")
report = sys.stderr
sys.argv = ["task"]
sys.addaudithook(guard)
exec(compile(code, "task", "exec"), {"__name__": "task"})
report.write("\\n" + word)
report.flush()
"""


class Outcome(NamedTuple):
    ok: bool
    why: str  # "" or the last line of what went wrong


def run(code: str, seconds: int = 2, megabytes: int = 512) -> Outcome:
    """Whether the code ends well, within its limits.

    Raises: ConfigError on systems without such limits.
    """
    require(os.name == "posix", "running a model's code needs the limits of a POSIX system: score whether it parses instead")
    word = secrets.token_hex(16)
    command = [sys.executable, "-I", "-S", "-B", "-c", GUARD, word, str(seconds), str(megabytes << 20)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            process.communicate(code.encode("utf-8", "replace"), timeout=2 * seconds + 3)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        errors.seek(0)
        said = errors.read(1 << 16).decode("utf-8", "replace").strip()
    if process.returncode == 0 and said.endswith(word):
        return Outcome(True, "")
    stopped = process.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
    return Outcome(False, f"more than {seconds} s" if stopped else said.rpartition("\n")[2] or "ended by itself")
