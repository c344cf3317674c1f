"""Every SQL statement of the system, by noun."""
