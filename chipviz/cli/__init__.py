"""The command line: options, inputs and what is printed."""
