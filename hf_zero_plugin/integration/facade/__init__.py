"""Holds the package that answers for ``import deepspeed`` while the plugin is active."""
