"""The delivery of a follow-up in five steps: claim, publish, begin, send, settle."""
