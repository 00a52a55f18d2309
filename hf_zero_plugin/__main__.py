"""``python -m hf_zero_plugin script.py ...`` and ``torchrun -m hf_zero_plugin script.py ...``."""

from hf_zero_plugin.cli.main import main_run_module

if __name__ == "__main__":
    main_run_module()
