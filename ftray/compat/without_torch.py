"""Transformers' tokenizers without torch, for processes that only load one.

`transformers.utils.is_torch_available` is public, but nothing says that it may be replaced: seen in transformers 5.22.2
to 5.23.0. In others torch may be imported for all that, which takes seconds and memory and changes no token.
"""

from transformers import utils
from transformers.utils import import_utils


def leave_out_torch() -> None:
    """Let transformers take torch for missing, in this process: before anything else of it is imported."""
    for module in (utils, import_utils):
        module.is_torch_available = _no


def _no() -> bool:
    return False
