"""The REST API, served by the process `web`."""
