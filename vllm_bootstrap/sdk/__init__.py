"""The Python client in parts. ``vllm_bootstrap.client`` is its public face: import from there."""
