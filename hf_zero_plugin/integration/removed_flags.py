"""``training_args.overwrite_output_dir`` for scripts written for transformers 4: the flag is gone, their reads are not.

The launcher drops ``--overwrite_output_dir`` from the arguments of a script that does not define it, and leaves word
in the environment; a script of that time then asks ``training_args.overwrite_output_dir``.
"""

from __future__ import annotations

import os
from types import ModuleType

__all__ = ["OVERWRITE_VARIABLE", "restore_overwrite_output_dir"]

OVERWRITE_VARIABLE = "HF_ZERO_OVERWRITE_OUTPUT_DIR"
"""Set to 1 by the launcher when it has dropped the flag."""


def restore_overwrite_output_dir(training_args: ModuleType) -> None:
    """Give ``TrainingArguments`` the attribute back, as a plain class attribute: no field, so no flag and no JSON key.

    Does nothing where transformers has it, or where the launcher has dropped nothing.

    Args:
        training_args: the module ``transformers.training_args``.
    """
    cls = training_args.TrainingArguments
    if os.environ.get(OVERWRITE_VARIABLE) == "1" and not hasattr(cls, "overwrite_output_dir"):
        cls.overwrite_output_dir = True
