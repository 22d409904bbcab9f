"""`align` in a fork of this process, so that a script of many runs pays for the imports once."""

import multiprocessing
import os
import signal
import sys
import traceback

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from alignment_modules.cli import main
from alignment_modules.policies.load import build_policy, load_tokenizer


def import_all(policy):
    """Imports what a run imports, by loading a folder's policy and tokenizer."""
    build_policy(policy)
    load_tokenizer(policy)


def align(log, arguments, seconds):
    """Runs `align` with its output in a file, as the head of a session; its exit code, which is -N after signal N."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(log, arguments))
    process.start()
    process.join(timeout=seconds)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


def _run(log, arguments):
    os.setsid()
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["align", *arguments]
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(70)
