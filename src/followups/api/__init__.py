"""The REST API, served by the `web` process."""
