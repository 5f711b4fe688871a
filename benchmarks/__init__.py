"""What the limits cost, measured beside what they are compared with, in one run: `python -m benchmarks --help`.

`rows` says what is compared and how much it may be; `room` times it; `session` is one run, and `report`, `plot` and `profiling`
are what comes out. What is timed: `handlers` (requests to the views of `site`, whose table is `policies`), `chain` (a
middleware by itself), `alone` (a store by itself), `floor` (two raw round trips), `peer` (another limiter), with `holders` and
`tables` for what is there meanwhile; `servers` and `load` for real servers. `host_store`, `waiting` and `simulate` are programs
of their own.
"""
