"""Everything that is known about a bundle, for the one who signs it off: a page, and a bill of materials."""
