"""``followups doctor``: every check, and what to do about what it finds."""
