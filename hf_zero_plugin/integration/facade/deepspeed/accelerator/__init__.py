from hf_zero_plugin.integration.accelerator import get_accelerator

__all__ = ["get_accelerator"]
