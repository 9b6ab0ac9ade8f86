"""Networks carried to and from other programs."""
