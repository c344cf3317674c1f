"""Claim, publish, begin, send, settle: the way of a follow-up."""
