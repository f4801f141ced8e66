"""`planish search`: which weight format each site gets within a budget."""
