from hf_zero_plugin.integration.zero_api import clone_tensors_for_torch_save

__all__ = ["clone_tensors_for_torch_save"]
