"""The REST API (process web)."""
