"""Goes through the rows, each in a process that measures, within a limit of time: none can stop the rest."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import worker_request
from plan import Row
from protocol import Worker, WorkerError
from results import Results

LOG = "worker.log"
_HERE = Path(__file__).parent
_START_SECONDS = 180.0  # for a worker to import its packages and find its device
_REPORT_SECONDS = 5.0  # of the budget, for table and plots


class Session:
    """One run of the benchmark.

    Args:
        smoke: tiny sizes on the CPU.
        log: file for what the workers print.
        row_seconds: limit on a row.
        budget: seconds for the whole run, from now.
        fla_python: an interpreter that has torch and fla-core.
    """

    def __init__(self, *, smoke: bool, log: Path, row_seconds: float, budget: float, fla_python: str):
        self._smoke = smoke
        self._log = log
        self._row_seconds = row_seconds
        self._end = time.monotonic() + budget - _REPORT_SECONDS
        self._pythons = {"worker.py": sys.executable, "fla_worker.py": fla_python}
        self._worker: tuple[str, Worker] | None = None

    def hello(self) -> dict[str, Any]:
        """Device, platform, versions and source digest.

        Raises:
            WorkerError: JAX finds no such device, or a package is missing.
        """
        return self._started("worker.py").ask({"kind": "hello"}, _START_SECONDS)

    def move_log(self, path: Path) -> None:
        """Moves the log file; workers go on writing to it."""
        os.replace(self._log, path)
        self._log = path
        if self._worker:
            self._worker[1].log = path

    def measure(
        self, rows: Sequence[Row], implementation: str, results: Results, done: Callable[[Row, dict[str, Any]], None]
    ) -> list[Row]:
        """Measures rows, calling done(row, result) after each; the rows for which the budget was too small."""
        for i, row in enumerate(rows):
            if time.monotonic() >= self._end:
                return list(rows[i:])
            try:
                result = self._measured(row, implementation)
            except WorkerError as error:
                self.close()
                if time.monotonic() >= self._end:  # cut short, which says nothing of the row
                    return list(rows[i:])
                result = {"error": str(error)}
            results.add(row.key, result)
            done(row, result)
        return []

    def drop_empty_log(self) -> None:
        """Removes the log file if no worker printed anything."""
        if self._log.exists() and not self._log.stat().st_size:
            self._log.unlink()

    def close(self) -> None:
        """Ends the worker, if there is one; its GPU memory and lasting errors go with it."""
        if self._worker:
            self._worker[1].close()
            self._worker = None

    def _measured(self, row: Row, implementation: str) -> dict[str, Any]:
        request = worker_request.encode(row, smoke=self._smoke, implementation=implementation)
        if row.provider != "first-step":
            script = "fla_worker.py" if row.provider.startswith("fla-") else "worker.py"
            return self._started(script).ask(request, self._seconds_left())
        with tempfile.TemporaryDirectory() as cache:
            steps = {}
            for name in ("first", "second"):
                self.close()
                steps[name] = self._started("worker.py", cache).ask(request, self._seconds_left())
            self.close()
        return steps

    def _seconds_left(self) -> float:
        return max(0.0, min(self._row_seconds, self._end - time.monotonic()))

    def _started(self, script: str, cache: str | None = None) -> Worker:
        """The worker that runs `script`; one of the other script is ended first."""
        if self._worker and self._worker[0] != script:
            self.close()
        if not self._worker:
            command = [self._pythons[script], str(_HERE / script)]
            self._worker = script, Worker(command, self._environment(cache), self._log)
        return self._worker[1]

    def _environment(self, cache: str | None) -> dict[str, str]:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu" if self._smoke else "cuda",
        }
        if self._smoke:
            environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # what takes time there is compilation
        # workers follow one another quickly, and a peer may need the memory
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        if cache:
            environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        return environment
