"""Adapters to the disk: identity, blobs, chunk maps, manifests, home."""
