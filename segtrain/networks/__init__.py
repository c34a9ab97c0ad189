"""Networks by name. A module in this folder that registers its networks is found by itself."""

from segtrain.networks.network import Network
from segtrain.networks.registry import create_network, list_networks, register_network

__all__ = ["Network", "create_network", "list_networks", "register_network"]
