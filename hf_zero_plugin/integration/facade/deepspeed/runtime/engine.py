from hf_zero_plugin.engine.engine import ZeroEngine as DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
