"""vllm-bootstrap: turns a GPU box into a dependable LLM endpoint."""

__version__ = "0.1.0"
