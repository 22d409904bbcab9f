"""Decoding of Llama-like policies by matrix products on their own weights, without the modules around them."""
