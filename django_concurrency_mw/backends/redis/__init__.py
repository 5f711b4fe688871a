"""The Redis store, in small rooms: wire format, connecting, threads (`lines`), event loops (`mux`), and what they share."""
