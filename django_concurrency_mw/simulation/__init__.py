"""The simulation: what a table of policies would have done with the requests of an access log.

`formats` knows the kinds of logs, `text_lines`, `json_lines` and `stamps` read a line, `reading` a file, `matching` finds what
each request would have asked for (a view by `paths`, the usual keys by `quick_keys`) and `slots` numbers it, `sorting` brings
all of them into the order in which they began, `spreading` puts whole seconds at instants, `replay` lets them in or turns them
away (`spread_replay` in all ways of spreading), and `report` has the figures. `running` does all of it.
"""
