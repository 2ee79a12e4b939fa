"""Who carries bytes: transports, the two-way exchange over them, and what ranks agree on."""
