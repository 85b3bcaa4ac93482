"""bench: mlagen beside its peers and beside the floor, over numbers of tokens; as a table, as CSV and as a plot."""
