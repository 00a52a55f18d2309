from hf_zero_plugin.integration.zero_api import (
    GatheredParameters,
    Init,
    register_external_parameter,
    unregister_external_parameter,
)

__all__ = ["GatheredParameters", "Init", "register_external_parameter", "unregister_external_parameter"]
