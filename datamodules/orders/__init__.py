"""Orders: which rows make each batch of an epoch."""

from datamodules.orders.base import Order
from datamodules.orders.uniform import UniformOrder

__all__ = ["Order", "UniformOrder"]
