"""The console at ``/console`` of the `web` process, for viewing and managing follow-ups in a browser."""
