"""Scheduled chat follow-ups: each sent at its moment, once, unless something cancelled it first."""
