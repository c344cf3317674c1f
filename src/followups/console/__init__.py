"""The console at ``/console`` of the process ``web``: people see, understand and steer follow-ups in a browser."""
