from hf_zero_plugin.integration.optimizer_names import DeepSpeedCPUAdagrad

__all__ = ["DeepSpeedCPUAdagrad"]
