"""``followups demo``: a scripted scenario on the real system, and how it is shown."""
