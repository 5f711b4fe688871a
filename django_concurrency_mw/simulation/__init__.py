"""The simulation: what a table of policies would have done with the requests of an access log.

`formats` and `stamps` read a line, `reading` a file, `matching` finds what each request would have asked for (a view by
`paths`, the usual keys by `quick_keys`), `sorting` brings all of them into the order in which they began, `spreading` puts
whole seconds at instants, `replay` lets them in or turns them away, and `report` has the figures. `run` does all of it.
"""
