"""Connections between ranks that tell every rank when another dies, fails, or stops answering."""

from lightning_megatron.liveness.watch import EXIT_CODE, PeerWatch
from lightning_megatron.liveness.wire import Endpoint

__all__ = ["EXIT_CODE", "Endpoint", "PeerWatch"]
