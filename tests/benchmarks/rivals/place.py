"""The addresses of the rivals' database, broker and receiver."""

import os

DATABASE = os.environ.get("BENCH_DATABASE", "")
BROKER = os.environ.get("BENCH_BROKER", "")
RECEIVER = os.environ.get("BENCH_RECEIVER", "")
