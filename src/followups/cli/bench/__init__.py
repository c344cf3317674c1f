"""``followups bench``: put load on the configured servers, isolated from production data."""
