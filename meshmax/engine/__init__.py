"""Adapters to what runs models."""
