"""Import networks from other programs and export networks to them."""
