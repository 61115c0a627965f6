"""Checkpoints between Megatron's format and Hugging Face's, plain and with mHC."""
