"""A tokenizer loaded by a process of its own, without torch, which would lie in this one's memory until all is done."""

import json
import subprocess
import sys

from ftray.data.fast_tokenizer import AnyTokenizer, FastTokenizer, state_of


def load_apart(path: str, chat_template: str | None) -> AnyTokenizer:
    """As :func:`ftray.models.tokenizer.load_tokenizer`, which this process calls where it has torch, or something is
    wrong, or the tokenizer does something of its own.
    """
    from ftray.models.tokenizer import load_tokenizer

    if "torch" not in sys.modules:
        command = [sys.executable, "-m", __name__]
        given = json.dumps([path, chat_template])
        child = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
        if child.returncode == 0 and child.stdout:
            return FastTokenizer(child.stdout)
    return load_tokenizer(path, chat_template=chat_template)


def _print_state() -> None:
    from ftray.compat.without_torch import leave_out_torch

    leave_out_torch()
    from ftray.models.tokenizer import load_tokenizer

    path, chat_template = json.load(sys.stdin)
    sys.stdout.write(state_of(load_tokenizer(path, chat_template=chat_template)) or "")


if __name__ == "__main__":
    _print_state()
