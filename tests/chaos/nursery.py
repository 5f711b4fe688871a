"""A process that forks others, for tests of many processes: it has no threads, so whatever it forks begins like a worker of a
server does, and in a few milliseconds.

Each scenario is a function of `tests.chaos.scenarios` in a fork of its own; what that leaves behind is killed with it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..servers import ROOT


class Nursery:
    """The process, as the tests see it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, scenario: str, seconds: float = 120.0, **arguments: Any) -> dict[str, Any]:
        """What the scenario returns. Raises: AssertionError with what it raised; or it takes longer than `seconds`."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.nursery"],
                cwd=ROOT,
                env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"scenario": scenario, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.stop()
            raise AssertionError(f"{scenario} takes longer than {seconds} s")
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def stop(self) -> None:
        if self.process is not None:
            for group in (self._scenario(), self.process.pid):
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            self.process.communicate()
            self.process = None

    def _scenario(self) -> int:
        """The group of the one that runs now."""
        assert self.process is not None
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else pid


def main() -> None:
    import django

    django.setup()
    from . import scenarios

    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.NamedTemporaryFile("r+") as answer:
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)
                try:
                    result = getattr(scenarios, asked["scenario"])(**asked["arguments"])
                except BaseException:
                    result = {"error": traceback.format_exc()}
                Path(answer.name).write_text(json.dumps(result))
                os._exit(0)
            with suppress(ProcessLookupError, PermissionError):
                os.setpgid(pid, pid)
            os.waitpid(pid, 0)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            print(Path(answer.name).read_text() or '{"error": "it was killed"}', flush=True)


if __name__ == "__main__":
    main()
