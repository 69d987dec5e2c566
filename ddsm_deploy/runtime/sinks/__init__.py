"""Where the masks of a stream go: one file a kind, behind one Protocol."""
