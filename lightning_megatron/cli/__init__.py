"""The command line: each module parses arguments and calls the library."""
