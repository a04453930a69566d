"""The data plane: one request's journey from a client's connection to an engine and back.

``make_protocol(Gateway(guard, gate, limits))`` is given to uvicorn as its ``http`` class; everything else is inside.
"""

from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.limits import GatewayLimits, RequestRecord
from vllm_bootstrap.gateway.protocol import make_protocol

__all__ = ["Gateway", "GatewayLimits", "RequestRecord", "make_protocol"]
