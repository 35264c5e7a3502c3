"""Programs in processes of their own, without the seconds that importing torch and transformers takes each time.

They are forked from a server that has imported these (`multiprocessing`'s fork server). Use a fresh interpreter instead where a test is about
starting one: imports, memory, threads, or variables that libraries read when they are imported.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = [
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.testing",
    "accelerate",
    "datasets",
    "peft",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "fts.trainer",
    "fts.testing",
    "fts.cli",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


def _main(words: Sequence[str], environment: Mapping[str, str], folder: str, output: str) -> None:
    """What the process does: run the words as Python's command line has them."""
    os.setsid()
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    code: Any = 0
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            sys.path.insert(0, folder)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


class Program:
    """A program that runs; like `subprocess.Popen`, with `communicate`."""

    def __init__(self, words: Sequence[Any], environment: Mapping[str, str] | None = None, folder: Path = ROOT) -> None:
        self.words = [str(word) for word in words]
        self._directory = tempfile.TemporaryDirectory()
        self._output = os.path.join(self._directory.name, "output")
        variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | (environment or {})
        self._process = CONTEXT.Process(target=_main, args=(self.words, variables, str(folder), self._output))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        self._process.join(0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def _text(self, name: str) -> str:
        path = Path(f"{self._output}.{name}")
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.words, timeout, self._text("out"), self._text("err"))
        return subprocess.CompletedProcess(self.words, self._process.exitcode, self._text("out"), self._text("err"))


def run(*words: Any, timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program, `FILE.py ARGUMENT ...` or `-m MODULE ARGUMENT ...`, to its end."""
    return Program(words, **options).wait(timeout)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def run_ranks(*words: Any, processes: int, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a program in several processes with the variables that torchrun sets. Where one fails, the others are killed."""
    shared = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _free_port(),
        "GROUP_RANK": 0,
    }
    running = [
        Program(words, {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()})
        for rank in range(processes)
    ]
    end = time.monotonic() + timeout
    while any(program.poll() is None for program in running):
        if any(program.poll() for program in running) or time.monotonic() > end:
            time.sleep(0.5)
            for program in running:
                if program.poll() is None:
                    program.kill()
            break
        time.sleep(0.01)
    done = [program.wait() for program in running]
    code = next((one.returncode for one in done if one.returncode), 0)
    return subprocess.CompletedProcess(
        list(words), code, "".join(one.stdout for one in done), "".join(one.stderr for one in done)
    )
