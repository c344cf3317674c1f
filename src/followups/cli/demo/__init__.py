"""``followups demo``: a scripted scenario on the real system, and its presentation."""
