"""Private names of other libraries: nowhere else are they touched, and `tests/test_compat.py` says when one changes.

One file a library, or a part of it that costs an import of its own. Each name has its reason, and the version of the
library that it was last seen in.
"""
