"""Run a user's training script in this process, with the engine in place.

::

    python -m hf_zero_plugin script.py ARGS          torchrun -m hf_zero_plugin script.py ARGS
    python -m hf_zero_plugin -m package.module ARGS  hf-zero run script.py ARGS   (when it needs one process)

The script sees what it would see under plain python: its own name and arguments in ``sys.argv``, its own
directory first in ``sys.path``, itself as ``__main__``. Only ``import deepspeed`` answers differently.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import signal
import sys
from pathlib import Path

from hf_zero_plugin.cli.console import report_error, wants_traceback
from hf_zero_plugin.cli.script_args import check_deepspeed_config, deepspeed_value, drop_removed_flags
from hf_zero_plugin.errors import HfZeroError, LaunchError
from hf_zero_plugin.integration.use_cpu import hide_gpus_instead_of_use_cpu

__all__ = ["EXIT_USAGE", "LAUNCHER_PID_VARIABLE", "check_target", "die_with_launcher", "run_target"]

EXIT_USAGE = 2
"""Exit code of every error that this package raises on purpose."""

LAUNCHER_PID_VARIABLE = "HF_ZERO_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1


def check_target(target: str, *, as_module: bool) -> Path | None:
    """The file that will run, found without importing it.

    Returns:
        The script; for a module its source file, or None when only importing its package could tell.

    Raises:
        LaunchError: there is no such script or module.
    """
    if as_module:
        return _module_file(target)
    script = Path(target)
    if script.is_file() or (script / "__main__.py").is_file():
        return script if script.is_file() else script / "__main__.py"
    hint = "Check the path; it is taken from the current directory."
    if script.suffix != ".py" and not target.startswith("-"):
        hint += " To run a module by its name, put -m before it."
    if target.startswith("-"):
        hint = "Options of the script come after the script's name."
    raise LaunchError(f"no script at {target!r} (looked in {os.getcwd()}). {hint}")


def run_target(target: str, script_args: list[str], *, as_module: bool) -> int:
    """Activate the engine, check the config, and run the script as ``__main__``.

    Returns:
        2 if the script ended with one of our own errors, 130 if Ctrl-C ended it, else 0. ``SystemExit`` and every
        other exception of the script pass through, so that its exit code and its traceback are its own.
    """
    try:
        source = check_target(target, as_module=as_module)
        check_deepspeed_config(script_args)
        if deepspeed_value(script_args) is not None:
            hide_gpus_instead_of_use_cpu()
        script_args = drop_removed_flags(script_args, source)
        _activate()
        _run_as_main(target, script_args, as_module=as_module)
    except HfZeroError as error:
        report_error(error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        if wants_traceback():
            raise
        print("hf-zero: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    return 0


def die_with_launcher() -> None:
    """Ask the kernel to end this rank when the launcher that started it is gone, SIGKILL included."""
    launcher = os.environ.pop(LAUNCHER_PID_VARIABLE, "")
    if not launcher.isdigit() or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    # The launcher may have died before the line above: then nobody will send the signal.
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGTERM)


def _activate() -> None:
    from hf_zero_plugin.integration.activate import activate

    activate(prefer_ours=True)


def _run_as_main(target: str, script_args: list[str], *, as_module: bool) -> None:
    sys.argv = [target, *script_args]
    if as_module:
        _replace_first_path(os.getcwd())
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        # runpy inserts a directory or zip itself; for a plain file python would insert its directory.
        if Path(target).is_file():
            _replace_first_path(os.path.dirname(os.path.realpath(target)))
        # Absolute, because python makes __file__ so: a script may change the directory and then look beside itself.
        runpy.run_path(os.path.abspath(target), run_name="__main__")


def _replace_first_path(directory: str) -> None:
    """Put ``directory`` where python put ours: the bin directory of hf-zero, or the current one under -m."""
    if getattr(sys.flags, "safe_path", False):
        return
    sys.path[0] = directory


def _module_file(name: str) -> Path | None:
    root = name.partition(".")[0]
    # Under hf-zero the current directory is not in sys.path, but it will be when the module runs.
    sys.path.insert(0, os.getcwd())
    try:
        spec = importlib.util.find_spec(root)
    except (ImportError, ValueError):
        spec = None
    finally:
        sys.path.pop(0)
    if spec is None:
        raise LaunchError(
            f"no module named {root!r} (-m {name}). Install it, or start from the directory that holds it; "
            "to run a file, leave out -m."
        )
    return Path(spec.origin) if "." not in name and spec.origin and not spec.submodule_search_locations else None
