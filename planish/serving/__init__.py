"""planish inside servers: each module is for one server, and is imported by that server only."""
