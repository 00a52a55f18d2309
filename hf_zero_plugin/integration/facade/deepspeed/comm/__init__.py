from hf_zero_plugin.integration.comm import *  # noqa: F403 - the names of torch.distributed, and init_distributed
from hf_zero_plugin.integration.comm import __all__ as __all__
