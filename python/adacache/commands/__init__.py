"""The command `adacache` and its subcommands."""
