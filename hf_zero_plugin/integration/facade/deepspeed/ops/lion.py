from hf_zero_plugin.integration.optimizer_names import DeepSpeedCPULion

__all__ = ["DeepSpeedCPULion"]
