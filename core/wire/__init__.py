"""C and its bytes: what is kept of a block, how it is coded, and where it lies in a message."""
