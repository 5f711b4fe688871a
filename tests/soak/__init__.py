"""A day in production, in minutes: real servers on stores that fail over, and whether the promises were kept.

`python -m tests.soak` (see `make soak`). One limit of 5 and some others, gunicorn and uvicorn with 2 workers each, on a
Sentinel trio and then on a Cluster of three masters; clients that leave, masters that go, slots that move, servers that are
restarted with another table, workers that are killed or stand still. What the views themselves counted is judged at the end.
"""
