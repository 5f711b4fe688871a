"""The host store: one count for all processes, threads and event loops of one Linux machine, without a server."""
