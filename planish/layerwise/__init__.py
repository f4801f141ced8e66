"""`planish layers`: a compressed checkpoint site by site."""
