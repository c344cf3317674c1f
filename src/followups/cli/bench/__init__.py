"""``followups bench``: load on the configured stack, apart from what it is used for."""
