"""Where a failure begins: the module, the node, whose fault it is, and a case to run alone."""
