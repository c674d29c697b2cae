"""Frozen language models: loading, chat templates, activations, and hooks for adapters."""
