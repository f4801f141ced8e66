"""What the machine gives: devices and their memory, the C library's heap, threads, arithmetic."""
