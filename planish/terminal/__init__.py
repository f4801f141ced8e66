"""What every command does at the terminal: options, messages, progress."""
