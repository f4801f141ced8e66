"""What all rooms of the front door use: strict decoding, JSON, YAML, files that appear whole, units."""
