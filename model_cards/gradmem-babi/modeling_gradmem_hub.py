"""Loads this checkpoint with the installed hf_gradmem package, which holds all of its code."""

from hf_gradmem import GradMemConfig, GradMemForCausalLM

__all__ = ["GradMemConfig", "GradMemForCausalLM"]
