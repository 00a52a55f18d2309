from hf_zero_plugin.engine.schedules import VALID_LR_SCHEDULES

__all__ = ["VALID_LR_SCHEDULES"]
