"""One file a command: read the arguments, call the library, show what came back."""
