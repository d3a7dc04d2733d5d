"""Adapters to the network: libp2p, mDNS, the asyncio bridge."""
