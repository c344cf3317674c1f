"""The way of a follow-up: claim, publish, begin, send, settle."""
